"""Both loaders: one order, one scale, the same pictures; DALI is measured against Pillow."""

import sys
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sadm_fast.data import LoaderSpec, load_samples, open_images
from sadm_fast.data.adm_crop import adm_crop
from sadm_fast.data.batch import ImageBatch, stack_crops
from sadm_fast.data.image_folder import ImageFolder
from sadm_fast.data.source import ImageSource
from sadm_fast.errors import UserError
from sadm_fast.scales import pixels_to_float
from tests.data.loaders import open_loader
from tests.data.tables import make_table, write_table

LOADERS = ["dali", "torch"]
FLOOR = 65.0  # dB, DALI's loader against Pillow: one level in every fiftieth value; test_adm_crop.py has photographs


def _batches(source: ImageSource, count: int, **changes: Any) -> list[ImageBatch]:
    with open_loader(source, **{"flip": False} | changes) as loader:
        return list(islice(loader, count))


def _assert_equal(actual: list[ImageBatch], expected: list[ImageBatch]) -> None:
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a.sample_ids, b.sample_ids)
        assert torch.equal(a.labels, b.labels)
        assert torch.equal(a.images, b.images)


def _psnr(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Of images in [-1, 1], over all of them, in dB: the peak is the range of 2."""
    return float(10 * torch.log10(4 / (actual - expected).pow(2).mean()))


@pytest.mark.parametrize("loader", LOADERS)
def test_shapes_and_dtypes(small_folder: Path, loader: str) -> None:
    for channels in (1, 3):
        (batch,) = _batches(open_images(small_folder), 1, loader=loader, channels=channels)
        assert batch.images.shape == (4, channels, 8, 8) and batch.images.dtype == torch.float32
        assert batch.images.is_contiguous()
        assert batch.labels.shape == batch.sample_ids.shape == (4,)
        assert batch.labels.dtype == batch.sample_ids.dtype == torch.int64


@pytest.mark.parametrize("loader", LOADERS)
def test_an_epoch_shows_every_image_with_its_own_label(small_folder: Path, loader: str) -> None:
    folder = open_images(small_folder)
    batches = _batches(folder, 11, loader=loader)  # 44 samples: four epochs of 11
    ids = torch.cat([batch.sample_ids for batch in batches])
    assert torch.equal(ids, torch.arange(44))
    images, labels = (torch.cat([batch[part] for batch in batches]) for part in (0, 1))
    known = load_samples(folder, range(11), LoaderSpec(8, 1))
    for epoch in range(4):
        found = [int((known == image).all(dim=(1, 2, 3)).nonzero()) for image in images[11 * epoch : 11 * epoch + 11]]
        assert sorted(found) == list(range(11))
        assert folder.labels[found].tolist() == labels[11 * epoch : 11 * epoch + 11].tolist()


def _stream(source: ImageSource, steps: int, world_size: int = 1, **changes: Any) -> list[torch.Tensor]:
    """images, labels, sample_ids of all ranks over `steps` micro-steps, in global order; each [n, ...]."""
    ranks = [_batches(source, steps, rank=rank, world_size=world_size, **changes) for rank in range(world_size)]
    in_order = [batches[step] for step in range(steps) for batches in ranks]
    return [torch.cat(parts) for parts in zip(*in_order, strict=True)]


ALL_OF_IT = ({"micro_batch": 7}, {"world_size": 3, "micro_batch": 2, "grad_accumulation": 2})


@pytest.mark.parametrize(
    "loader, before, after",
    [
        ("dali", {"grad_accumulation": 2}, {"grad_accumulation": 2}),  # the same division
        ("dali", {"world_size": 2}, {"world_size": 1}),
        ("dali", *ALL_OF_IT),
        ("torch", *ALL_OF_IT),
    ],
    ids=["same", "fewer ranks", "all of it", "all of it, torch"],
)
def test_resume_in_mid_epoch_continues_exactly(
    small_folder: Path, loader: str, before: dict[str, Any], after: dict[str, Any]
) -> None:
    source = open_images(small_folder)
    options: dict[str, Any] = {"loader": loader, "flip": True}
    first = _stream(source, 2, **options, **before)  # 14 or 16 samples: in the second epoch of 11
    second = _stream(source, 3, first_sample=len(first[2]), **options, **after)
    whole = _stream(source, 1, **options, micro_batch=len(first[2]) + len(second[2]))
    assert torch.equal(whole[2], torch.arange(len(whole[2])))
    for a, b, c in zip(first, second, whole, strict=True):
        assert torch.equal(torch.cat([a, b]), c)


def test_every_layout_gives_the_batches_of_the_folder_it_was_made_from(small_folder: Path, small_shards: Path) -> None:
    folder, shards = open_images(small_folder), open_images(small_shards, kind="webdataset")
    table = make_table([folder.read(i) for i in range(11)], folder.labels.tolist())
    write_table(small_shards.parent / "train.parquet", table, row_group_size=3)
    rows = open_images(small_shards.parent / "train", "huggingface")
    whole = _batches(folder, 6, flip=True)
    _assert_equal(_batches(shards, 6, flip=True), whole)
    first = _batches(rows, 2, loader="dali", flip=True)
    rest = _batches(rows, 4, loader="torch", flip=True, first_sample=8)
    _assert_equal(first + rest, whole)


def test_batches_stay_valid_while_more_are_loaded(small_folder: Path) -> None:
    with open_loader(open_images(small_folder), flip=False) as loader:
        first = next(loader)
        copy = first.images.clone(), first.labels.clone(), first.sample_ids.clone()
        for _ in range(8):
            next(loader)
    assert all(torch.equal(a, b) for a, b in zip(first, copy, strict=True))


def test_a_loader_does_not_touch_the_programs_random_state(small_folder: Path) -> None:
    before = torch.get_rng_state()
    for loader in LOADERS:
        _batches(open_images(small_folder), 1, loader=loader, flip=True)
    assert torch.equal(torch.get_rng_state(), before)


# Sizes of both orientations, odd and even sides, at least 64 pixels on the shorter one.
SIZES = [(90, 64), (64, 97), (111, 111), (127, 85), (75, 126), (100, 100)]


@pytest.mark.parametrize("enlarge, channels", [(1, 3), (2, 1), (4, 3)])  # without halving, with one, with two
@pytest.mark.filterwarnings("error:The given NumPy array is not writable")
def test_dali_crops_like_pillow(photo: Any, make_folder: Any, enlarge: int, channels: int) -> None:
    images = {
        f"class/{i}.png": photo(width * enlarge + i % 2, height * enlarge + i % 3, seed=i)
        for i, (width, height) in enumerate(SIZES)
    }
    folder = open_images(make_folder(images))
    options = {"resolution": 64, "channels": channels, "micro_batch": len(SIZES), "flip": True}
    (actual,), (expected,) = (_batches(folder, 1, loader=loader, **options) for loader in LOADERS)
    assert _psnr(actual.images, expected.images) >= FLOOR


def test_large_images_appearing_late_are_halved_all_the_same(photo: Any, make_folder: Any) -> None:
    images = {f"class/{i}.png": photo(64, 64, seed=i) for i in range(12)}
    images["class/huge.png"] = photo(401, 300, seed=99)
    folder = open_images(make_folder(images))
    options = {"resolution": 64, "channels": 3, "micro_batch": 2, "seed": 2}
    actual, expected = (_batches(folder, 9, loader=loader, **options) for loader in LOADERS)
    assert all(torch.equal(a.sample_ids, b.sample_ids) for a, b in zip(actual, expected, strict=True))
    assert all(_psnr(a.images, b.images) >= FLOOR for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("loader", LOADERS)
def test_after_close_the_iteration_is_over(small_folder: Path, loader: str) -> None:
    with open_loader(open_images(small_folder), loader=loader) as batches:
        next(batches)
    assert list(batches) == []
    batches.close()


def test_names_that_are_not_ascii_are_read(small_folder: Path) -> None:
    (small_folder / "cat").rename(small_folder / "Kätzchen 猫")
    folder = open_images(small_folder)
    _assert_equal(*(_batches(folder, 3, loader=loader) for loader in LOADERS))


def test_load_samples_gives_the_asked_images_in_order(small_folder: Path) -> None:
    folder = ImageFolder.scan(small_folder)
    images = load_samples(folder, np.array([10, 3]), LoaderSpec(8, 1))
    assert images.shape == (2, 1, 8, 8) and images.dtype == torch.float32
    with Image.open(folder.path(10)) as image:
        expected = torch.from_numpy(np.array(image)).float() / 127.5 - 1
    assert torch.equal(images[0, 0], expected)


def test_the_demo_set_is_opened_by_its_name(demo_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SADM_CACHE", str(demo_root.parent))
    source = open_images("demo:mnist5k")
    assert len(source) == 5000 and source.where == str(demo_root)


def test_mixed_decode_without_a_gpu_is_refused(small_folder: Path) -> None:
    with pytest.raises(UserError, match="^data.decode=mixed: needs a GPU.*data.decode=auto$"):
        _batches(open_images(small_folder), 1, decode="mixed")


def test_mixed_decode_with_the_torch_loader_is_refused(small_folder: Path) -> None:
    with pytest.raises(UserError, match="^data.decode=mixed: data.loader=torch decodes on the CPU.*data.loader=dali$"):
        _batches(open_images(small_folder), 1, decode="mixed", loader="torch", device="cuda")


@pytest.mark.parametrize("decode", ["auto", "cpu"])
def test_without_a_gpu_decoding_is_on_the_cpu(small_folder: Path, decode: str) -> None:
    source = open_images(small_folder)
    _assert_equal(_batches(source, 2, decode=decode), _batches(source, 2, loader="torch"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("decode", ["mixed", "cpu"])
def test_a_gpu_run_gets_the_same_pictures(photo: Any, make_folder: Any, decode: str) -> None:
    names = [f"class/{i}.jpg" for i in range(6)]
    source = open_images(make_folder({name: photo(150, 130, seed=i) for i, name in enumerate(names)}, quality=95))
    options = {"resolution": 64, "channels": 3, "micro_batch": 6}
    (expected,) = _batches(source, 1, loader="torch", **options)
    for loader in LOADERS:
        how = {"decode": decode} if loader == "dali" else {}
        (actual,) = _batches(source, 1, loader=loader, device="cuda", **how, **options)
        assert all(part.is_cuda for part in actual)
        # The floor of nvJPEG's own interpolation of colours; told to interpolate as libjpeg does, it has not run yet.
        assert _psnr(actual.images.cpu(), expected.images) >= 35


@pytest.mark.parametrize("loader", LOADERS)
def test_small_images_are_enlarged_when_asked(photo: Any, make_folder: Any, loader: str) -> None:
    image = photo(20, 30, seed=1)
    source = open_images(make_folder({"class/0.png": image}))
    (batch,) = _batches(source, 1, loader=loader, resolution=32, channels=3, micro_batch=1, enlarge=True)
    expected = pixels_to_float(stack_crops([adm_crop(image, 32, enlarge=True)]))
    assert _psnr(batch.images, expected) >= FLOOR
    assert torch.equal(load_samples(source, [0], LoaderSpec(32, 3, enlarge=True)), expected)


def test_missing_dali_is_one_clear_line(small_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sadm_fast.data.dali_loader", None)
    with pytest.raises(UserError, match="data.loader=dali.*nvidia-dali-cuda130.*data.loader=torch"):
        _batches(open_images(small_folder), 1)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"loader": "tf"}, "loader='tf'"),
        ({"decode": "gpu"}, "decode='gpu'"),
        ({"channels": 2}, "channels=2"),
        ({"threads": 0}, "threads=0"),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(small_folder: Path, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _batches(open_images(small_folder), 1, **wrong)
