"""The DALI graph on the CPU against Pillow's ADM crop: exact where it can be, and how near over real photographs."""

import io
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sadm_fast.data.adm_crop import adm_crop, read_crop
from sadm_fast.data.dali_graph import crop_pipeline
from tests.data.photographs import write_photographs

# Peak signal-to-noise ratio over the photographs in dB, the least that is accepted: of the worst photograph, and of all
# of a kind together; what was measured stands behind. "halved": at least one box halving; an odd side differs in its
# middle row or column. "resized": only the bicubic step, which DALI does not round between its two passes (1/12 of a
# squared level twice: 56 dB). "enlarged": the shorter side is below the crop. With one channel, "made grey": from
# colours, which DALI rounds down (1/3 of a squared level on top: 51 dB).
FLOORS = {
    # crop, channels, kind
    (64, 3, "halved"): (48.5, 54.0),  # 48.8, 54.5
    (64, 3, "resized"): (55.0, 55.0),  # 55.1, 55.3
    (128, 3, "halved"): (52.0, 56.0),  # 52.2, 56.4
    (128, 3, "resized"): (55.0, 55.0),  # 55.7, 55.7
    (128, 3, "enlarged"): (54.5, 55.0),  # 54.8, 55.3
    (256, 3, "halved"): (55.0, 59.0),  # 55.3, 59.7
    (256, 3, "resized"): (55.0, 56.0),  # 55.1, 56.2
    (256, 3, "enlarged"): (54.5, 55.0),  # 54.6, 55.6
    (512, 3, "halved"): (53.0, 55.5),  # 53.5, 55.9
    (512, 3, "resized"): (55.0, 63.0),  # 55.9, 63.2
    (512, 3, "enlarged"): (54.5, 56.0),  # 54.6, 56.3
    (64, 1, "halved"): (55.0, 61.0),  # 55.1, 61.7
    (64, 1, "made grey"): (47.5, 52.0),  # 47.6, 52.5
    (256, 1, "halved"): (math.inf, math.inf),  # all are twice the crop
    (256, 1, "resized"): (55.0, 55.0),  # 55.2, 55.2
    (256, 1, "made grey"): (49.5, 54.0),  # 50.0, 54.1
}
CASES = list(dict.fromkeys(case[:2] for case in FLOORS))


def _crops(encoded: list[np.ndarray], size: int, channels: int = 3, halvings: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """DALI's crops uint8 [B, size, size, channels] and the images' shapes [B, 3], unflipped."""
    counters = np.zeros(len(encoded), np.int64)
    pipeline = crop_pipeline(
        lambda run: (encoded, counters, counters, counters.astype(np.int32)),
        size=size,
        channels=channels,
        halvings=halvings,
        mixed_decode=False,
        batch_size=len(encoded),
        num_threads=2,
        device_id=None,
        prefetch_queue_depth=1,
    )
    pipeline.build()
    crops, _, _, shapes = pipeline.run()
    return np.array(crops.as_tensor()), np.array(shapes.as_tensor())


def _noise(width: int, height: int) -> Image.Image:
    """The hardest picture to average exactly."""
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


def _png(image: Image.Image) -> np.ndarray:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return np.frombuffer(file.getvalue(), np.uint8)


def _decibels(squared_error: float) -> float:
    return 10 * math.log10(255**2 / squared_error) if squared_error else math.inf


def _is_grey(path: Path) -> bool:
    with Image.open(path) as image:
        return image.mode in ("L", "LA")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_photographs(tmp_path_factory.mktemp("photographs"))


def _errors(photographs: list[Path], size: int, channels: int) -> dict[str, list[tuple[float, str]]]:
    """(mean squared error, file name) of every photograph by kind."""
    found: dict[str, list[tuple[float, str]]] = {}
    crops, shapes = _crops([np.fromfile(path, np.uint8) for path in photographs], size, channels)
    for path, crop, (height, width, _) in zip(photographs, crops, shapes, strict=True):
        expected = read_crop(str(path), size, channels, enlarge=True)
        shorter = min(height, width)
        kind = "enlarged" if shorter < size else "resized" if shorter < 2 * size else "halved"
        if channels == 1 and not _is_grey(path):
            kind = "made grey"
        error = float(np.mean((crop.astype(np.float64) - expected) ** 2))
        found.setdefault(kind, []).append((error, path.name))
    return found


@pytest.mark.parametrize(
    "size, channels", [(256, 3), *(pytest.param(*case, marks=pytest.mark.soak) for case in CASES if case != (256, 3))]
)
def test_photographs_are_cropped_like_pillow(photographs: list[Path], size: int, channels: int) -> None:
    kinds = _errors(photographs, size, channels)
    assert {(size, channels, kind) for kind in kinds} == {case for case in FLOORS if case[:2] == (size, channels)}
    for kind, found in kinds.items():
        error, name = max(found)
        worst, together = _decibels(error), _decibels(float(np.mean([error for error, _ in found])))
        print(f"{size:4} {channels} {kind:9} {len(found):3} of them: {worst:.1f} ({name}), together {together:.1f} dB")
        least_worst, least_together = FLOORS[size, channels, kind]
        assert worst >= least_worst, (kind, name)
        assert together >= least_together, kind


@pytest.mark.parametrize("size", [8, 21, 64])
def test_even_sides_are_halved_exactly(size: int) -> None:
    images = [_noise(2 * size, 2 * size + 2 * i) for i in range(5)] + [_noise(2 * size + 6, 2 * size)]
    images += [_noise(4 * size, 4 * size), _noise(8 * size + 16, 8 * size)]
    crops, _ = _crops([_png(image) for image in images], size)
    np.testing.assert_array_equal(crops, [adm_crop(image, size) for image in images])


@pytest.mark.parametrize("size", [9, 16, 33, 62])
def test_odd_sides_are_halved_exactly_but_for_the_middle_row_and_column(size: int) -> None:
    image = _noise(2 * size + 1, 2 * size + 1)
    (crop,), _ = _crops([_png(image)], size)
    differs = (crop != adm_crop(image, size)).any(axis=2)
    away = np.abs(np.arange(size) - (size - 1) / 2) > 1
    assert not differs[np.ix_(away, away)].any()


def test_halvings_beyond_those_allowed_are_left_out() -> None:
    image = _noise(64, 64)
    (twice,), _ = _crops([_png(image)], 16, halvings=2)
    (once,), _ = _crops([_png(image)], 16, halvings=1)
    np.testing.assert_array_equal(twice, adm_crop(image, 16))
    assert (once != twice).any()


def test_crops_are_mirrored_and_come_with_what_was_handed_over() -> None:
    images = [_noise(16, 16 + i) for i in range(3)]
    counters = np.arange(3), np.arange(3) + 7, np.array([0, 1, 0], np.int32)
    pipeline = crop_pipeline(
        lambda run: (list(map(_png, images)), *counters),
        size=16,
        channels=3,
        halvings=0,
        mixed_decode=False,
        batch_size=3,
        num_threads=1,
        device_id=None,
    )
    pipeline.build()
    crops, labels, sample_ids, shapes = (np.array(output.as_tensor()) for output in pipeline.run())
    expected = [adm_crop(image, 16) for image in images]
    np.testing.assert_array_equal(crops, [expected[0], expected[1][:, ::-1], expected[2]])
    assert labels.tolist() == [0, 1, 2] and sample_ids.tolist() == [7, 8, 9]
    assert shapes.tolist() == [[16 + i, 16, 3] for i in range(3)]
