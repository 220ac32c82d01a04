"""The DALI graph against Pillow's ADM crop, over real photographs."""

from typing import Any

import numpy as np
import pytest

from sadm_fast.data.dali_graph import crop_pipeline


@pytest.mark.parametrize("from_paths", [True, False], ids=["paths", "encoded"])
def test_paths_and_encoded_images_give_the_same_crops(photo: Any, tmp_path: Any, from_paths: bool) -> None:
    files = [tmp_path / f"{i}.png" for i in range(3)]
    pixels = [np.asarray(photo(16, 16, seed=i)) for i in range(3)]
    for i, file in enumerate(files):
        photo(16, 16, seed=i).save(file)
    encoded: Any = [np.frombuffer(file.read_bytes(), np.uint8) for file in files]
    paths = np.array([list(bytes(file)) for file in files], np.uint8)
    counters = np.arange(3), np.arange(3) + 7, np.array([0, 1, 0], np.int32)
    pipeline = crop_pipeline(
        lambda run: (paths if from_paths else encoded, *counters),
        size=16,
        channels=3,
        halvings=0,
        from_paths=from_paths,
        mixed_decode=False,
        batch_size=3,
        num_threads=1,
        device_id=None,
    )
    pipeline.build()
    crops, labels, sample_ids, shapes = (np.asarray(output.as_tensor()) for output in pipeline.run())
    np.testing.assert_array_equal(crops, [pixels[0], pixels[1][:, ::-1], pixels[2]])
    assert labels.tolist() == [0, 1, 2] and sample_ids.tolist() == [7, 8, 9]
    assert shapes.tolist() == [[16, 16, 3]] * 3
