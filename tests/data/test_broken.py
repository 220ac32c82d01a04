"""Broken images in training: replaced by the next that can be read, counted, the same through both loaders."""

import os
import shutil
from collections.abc import Callable, Iterator
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sadm_fast.data import LoaderSpec, dali_loader, load_samples, open_images
from sadm_fast.data import broken as broken_module
from sadm_fast.data.batch import ImageBatch
from sadm_fast.data.broken import BrokenImages, read_or_replace
from sadm_fast.data.image_folder import ImageFolder
from sadm_fast.data.order import MicroBatchPlan
from sadm_fast.data.source import ImageSource
from sadm_fast.data.webdataset import TarShards
from sadm_fast.errors import UserError
from tests.data.loaders import open_loader

LOADERS = ["dali", "torch"]
SPEC = LoaderSpec(8, 1)
quick = settings(deadline=None, max_examples=50)


class Pictures(ImageSource):
    """Images in memory: picture i is 8x8 pixels of grey i, or unreadable."""

    where = "memory"

    def __init__(self, count: int, broken: set[int]) -> None:
        self.count, self.broken = count, broken
        self.labels, self.classes = np.arange(count) % 7, tuple("0123456")

    def name(self, index: int) -> str:
        return f"picture {index}"

    def read(self, index: int) -> bytes:
        if index in self.broken:
            return b"nothing"
        content = BytesIO()
        Image.new("L", (8, 8), index).save(content, format="PPM")
        return content.getvalue()

    def fingerprint(self) -> str:
        return ""

    def stamp(self) -> str:
        return ""

    def subset(self, indices: np.ndarray) -> "Pictures":
        raise NotImplementedError


def _loader(source: ImageSource, loader: str, **changes: Any) -> Any:
    return open_loader(source, loader=loader, **{"threads": 2 if loader == "dali" else 1} | changes)


def _batches(source: ImageSource, count: int, loader: str, **changes: Any) -> tuple[list[ImageBatch], dict[str, str]]:
    with _loader(source, loader, **changes) as batches:
        return list(islice(batches, count)), batches.broken


def _joined(batches: list[ImageBatch]) -> list[torch.Tensor]:
    return [torch.cat(parts) for parts in zip(*batches, strict=True)]


def _refusal(loader: Iterator[ImageBatch], at_most: int) -> str:
    """The message that ends the iteration within `at_most` batches."""
    with pytest.raises(UserError) as caught:
        for _ in range(at_most):
            next(loader)
    with pytest.raises(StopIteration):
        next(loader)
    message = str(caught.value)
    assert "\n" not in message and "encode.py --check" in message
    return message


@quick
@given(data=st.data(), count=st.integers(1, 120))
def test_the_stand_in_is_the_next_image_that_can_be_read(data: st.DataObject, count: int) -> None:
    good = data.draw(st.sets(st.integers(0, count - 1), min_size=1, max_size=4))
    index = data.draw(st.integers(0, count - 1))
    source = Pictures(count, set(range(count)) - good)
    steps = next(step for step in range(count) if (index + step) % count in good)
    if steps >= 100:
        with pytest.raises(UserError, match=rf"^picture {index}: is not an image.*the next 99 images"):
            read_or_replace(source, index, SPEC)
    else:
        crop = read_or_replace(source, index, SPEC)
        assert crop.index == (index + steps) % count
        assert sorted(crop.broken) == sorted((index + step) % count for step in range(steps))
        assert (crop.pixels == crop.index).all()


@quick
@given(count=st.integers(1, 20), data=st.data())
def test_known_broken_images_are_skipped_over_in_the_same_way(count: int, data: st.DataObject) -> None:
    bad = data.draw(st.sets(st.integers(0, count - 1), max_size=count - 1))
    source = Pictures(count, bad)
    known = BrokenImages(source)
    assert known.add(dict.fromkeys(bad, "why")) == bool(bad)
    assert not known.add(dict.fromkeys(bad, "why else"))
    assert known.reasons == {f"picture {index}": "why" for index in bad}
    expected = [read_or_replace(source, index, SPEC).index for index in range(count)]
    assert known.replace(np.arange(count)).tolist() == expected


def test_when_every_image_was_broken_at_some_time_each_is_tried_again() -> None:
    known = BrokenImages(Pictures(3, set()))
    known.add(dict.fromkeys(range(3), "why"))
    assert known.replace(np.arange(3)).tolist() == [0, 1, 2]


@pytest.mark.parametrize("count, limit", [(300, 100), (20_000, 200)])
def test_more_than_one_in_a_hundred_but_at_least_a_hundred_end_the_run(count: int, limit: int) -> None:
    known = BrokenImages(Pictures(count, set()))
    known.add(dict.fromkeys(range(limit), "is gone"))
    with pytest.raises(UserError, match=rf"^picture 0: is gone \(and {limit} more of {count} images: .*--check memory"):
        known.add({limit: "is gone"})


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


def _overwrite(source: ImageSource, index: int, start: int, content: bytes) -> None:
    """Change the bytes of an image in place, from `start` on."""
    path = source.path(index) if isinstance(source, ImageFolder) else ""
    if isinstance(source, TarShards):
        path = source.shards[source.index.shards[index]].path
        start += int(source.index.offsets[index])
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(content)


def _shrink(path: Path) -> None:
    Image.new("L", (8, 5)).save(path)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut off": (_truncate, "the image is damaged"),
    "empty": (lambda path: path.write_bytes(b""), "is an empty file"),
    "deleted": (Path.unlink, "cannot be read (FileNotFoundError"),
    "text": (lambda path: path.write_text("x"), "is not an image"),
    "too small": (_shrink, "8x5 pixels is smaller than data.resolution=8"),
}


@pytest.mark.parametrize("loader", LOADERS)
def test_whatever_is_damaged_the_next_image_is_shown_with_its_label(small_folder: Path, loader: str) -> None:
    folder = ImageFolder.scan(small_folder)
    pictures = load_samples(folder, range(11), LoaderSpec(8, 1))
    damaged = dict(zip((2, 3, 6, 9, 10), DAMAGE, strict=True))
    for index, what in damaged.items():
        DAMAGE[what][0](Path(folder.path(index)))
    stands_in = [0, 1, 4, 4, 4, 5, 7, 7, 8, 0, 0]  # 7 is of another class than 6, 0 is behind the end
    plan = MicroBatchPlan(num_images=11, seed=1, flip=True, micro_batch=4)
    batches, broken = _batches(folder, 9, loader)
    for position, batch in enumerate(batches):
        shown = [stands_in[index] for index in plan[position].indices]
        flips = torch.from_numpy(plan[position].mirror)[:, None, None, None]
        assert torch.equal(batch.images, torch.where(flips, pictures[shown].flip(-1), pictures[shown]))
        assert batch.labels.tolist() == folder.labels[shown].tolist()
        assert batch.sample_ids.tolist() == plan[position].sample_ids.tolist()
    assert len(broken) == len(damaged)
    for index, what in damaged.items():
        assert broken[folder.name(index)].startswith(DAMAGE[what][1])


@pytest.mark.parametrize("loader", LOADERS)
def test_it_does_not_depend_on_ranks_micro_batch_or_where_the_run_began(small_folder: Path, loader: str) -> None:
    folder = ImageFolder.scan(small_folder)
    for index in (2, 6, 7):
        _truncate(Path(folder.path(index)))
    whole = _joined(_batches(folder, 1, loader, micro_batch=36)[0])
    ranks = [_batches(folder, 3, loader, micro_batch=3, rank=rank, world_size=2, first_sample=18)[0] for rank in (0, 1)]
    parts = _joined([batch for pair in zip(*ranks, strict=True) for batch in pair])
    for a, b in zip(parts, whole, strict=True):
        assert torch.equal(a, b[18:])


@pytest.mark.parametrize("loader", LOADERS)
def test_broken_images_inside_shards_are_replaced_too(small_folder: Path, small_shards: Path, loader: str) -> None:
    folder, shards = ImageFolder.scan(small_folder), TarShards.scan(small_shards)
    for index in (2, 6, 7):
        _truncate(Path(folder.path(index)))
        _overwrite(shards, index, 60, bytes(int(shards.index.sizes[index]) - 60))
    from_folder, _ = _batches(folder, 6, loader)
    from_shards, broken = _batches(shards, 6, loader)
    for a, b in zip(_joined(from_folder), _joined(from_shards), strict=True):
        assert torch.equal(a, b)
    assert sorted(broken) == sorted(shards.name(index) for index in (2, 6, 7))


@pytest.mark.parametrize("loader", LOADERS)
def test_a_shard_that_becomes_shorter_while_training(small_shards: Path, loader: str) -> None:
    shards = TarShards.scan(small_shards)
    with _loader(shards, loader) as batches:
        next(batches)
        os.truncate(small_shards / "001.tar", int(shards.index.offsets[8]))
        shown = _joined(list(islice(batches, 16)))  # beyond what was read ahead
        assert set(batches.broken) == {shards.name(index) for index in range(6, 11)}  # all of that shard
    assert (shown[0].amax(dim=(1, 2, 3)) > -1).all()  # none of them black


@pytest.mark.parametrize("loader", LOADERS)
def test_a_stand_in_that_breaks_later_is_replaced_in_turn(small_folder: Path, loader: str) -> None:
    folder = ImageFolder.scan(small_folder)
    pictures = load_samples(folder, range(11), SPEC)
    _truncate(Path(folder.path(2)))
    with _loader(folder, loader, flip=False, micro_batch=11) as batches:
        first = next(batches)
        Path(folder.path(3)).unlink()
        later = list(islice(batches, 6))[-1]  # behind what was read ahead
        assert len(batches.broken) == 2
    plan = MicroBatchPlan(num_images=11, seed=1, flip=False, micro_batch=11)
    assert torch.equal(first.images[plan[0].indices == 2][0], pictures[3])
    for index in (2, 3):
        assert torch.equal(later.images[plan[6].indices == index][0], pictures[4])


@pytest.mark.parametrize("loader", LOADERS)
def test_data_that_vanish_end_the_run_with_one_line(small_folder: Path, loader: str) -> None:
    with _loader(ImageFolder.scan(small_folder), loader) as batches:
        next(batches)
        shutil.rmtree(small_folder)
        message = _refusal(batches, at_most=10)
    assert "cannot be read (FileNotFoundError" in message and "seem to be damaged or gone" in message


@pytest.mark.parametrize("loader", LOADERS)
def test_too_many_broken_images_end_the_run_with_one_line(
    small_folder: Path, loader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broken_module, "_LIMIT", 2)
    folder = ImageFolder.scan(small_folder)
    for index in (1, 5):
        _truncate(Path(folder.path(index)))
    with _loader(folder, loader) as batches:
        list(islice(batches, 6))  # every image was met twice
        _truncate(Path(folder.path(9)))
        message = _refusal(batches, at_most=20)
    assert "the image is damaged" in message and "and 2 more of 11 images" in message


@pytest.mark.parametrize("loader", LOADERS)
def test_a_source_of_our_own_is_read_in_either_loader(loader: str) -> None:
    batches, broken = _batches(Pictures(40, {5, 6, 20}), 10, loader, flip=False)
    shown = sorted(((_joined(batches)[0] + 1) * 127.5).round().int().flatten(1)[:, 0].tolist())
    assert shown == sorted([*set(range(40)) - {5, 6, 20}, 7, 7, 21])
    assert sorted(broken) == ["picture 20", "picture 5", "picture 6"]


def test_load_samples_replaces_as_the_loaders_do(small_folder: Path) -> None:
    folder = open_images(small_folder)
    pictures = load_samples(folder, range(11), SPEC)
    (small_folder / "cat/2.png").write_bytes(b"")
    assert torch.equal(load_samples(folder, [0, 2], SPEC), pictures[[0, 3]])
    shutil.rmtree(small_folder)
    with pytest.raises(UserError, match=r"cat/2\.png: cannot be read .*for the next 10 images"):
        load_samples(folder, [2], SPEC)


class Refusing:
    """A DALI pipeline that fails on the micro-batches with a sample id of `poison`, `times` times altogether."""

    def __init__(self, pipeline: Any, poison: set[int], times: list[int]) -> None:
        self._pipeline, self._poison, self._times = pipeline, poison, times

    def build(self) -> None:
        self._pipeline.build()

    def run(self) -> Any:
        outputs = self._pipeline.run()
        if self._times[0] > 0 and self._poison & set(np.asarray(outputs[2].as_tensor()).tolist()):
            self._times[0] -= 1
            raise RuntimeError("Critical error in pipeline: Error when executing X\nencountered:\n\n[file.cc] Boo\nC++")
        return outputs


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Callable[[set[int], int], list[int]]:
    """refuse(poison, times): DALI fails where sample ids of `poison` are, so often; [how often it still would]."""

    def install(poison: set[int], times: int) -> list[int]:
        left = [times]
        real = dali_loader.decode_pipeline
        monkeypatch.setattr(
            dali_loader, "decode_pipeline", lambda *a, **options: Refusing(real(*a, **options), poison, left)
        )
        return left

    return install


def test_a_failure_that_does_not_come_again_changes_nothing(small_folder: Path, refuse: Any) -> None:
    source = open_images(small_folder)
    expected, _ = _batches(source, 4, "torch")
    left = refuse({9, 10}, 1)
    actual, broken = _batches(source, 4, "dali")
    assert broken == {} and left == [0]
    for a, b in zip(_joined(actual), _joined(expected), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["folder", "webdataset"])
def test_images_that_only_dali_refuses_are_decoded_by_pillow_from_then_on(
    small_folder: Path, small_shards: Path, built: list[int], kind: str
) -> None:
    source = open_images({"folder": small_folder, "webdataset": small_shards}[kind], kind)
    for index in (2, 6, 7):
        content = source.read(index)
        _overwrite(source, index, content.index(b"IEND") - 8, b"oops")  # the checksum of the pixels
    expected, _ = _batches(source, 9, "torch", micro_batch=11)
    with _loader(source, "dali", micro_batch=11) as batches:
        actual = [next(batches)]
        assert built == [3]  # it fails twice
        actual += islice(batches, 8)
        assert batches.broken == {} and built == [3]
    for a, b in zip(_joined(actual), _joined(expected), strict=True):
        assert torch.equal(a, b)


def test_dali_that_fails_on_everything_is_said_so(small_folder: Path, refuse: Any) -> None:
    refuse(set(range(1000)), 10_000)
    with (
        _loader(ImageFolder.scan(small_folder), "dali") as batches,
        pytest.raises(UserError, match=r"DALI failed on images that Pillow reads \(\[file.cc\] Boo C\+\+\); .*torch"),
    ):
        next(batches)


def test_one_search_finds_all_broken_images_under_way(small_folder: Path, built: list[int]) -> None:
    folder = ImageFolder.scan(small_folder)
    plan = MicroBatchPlan(num_images=11, seed=1, flip=True, micro_batch=4)
    for position in range(3):
        _truncate(Path(folder.path(int(plan[position].indices[0]))))
    _, broken = _batches(folder, 6, "dali", prefetch=2)
    assert len(broken) == len({int(plan[position].indices[0]) for position in range(3)}) and built == [2]


def test_a_read_that_fails_once_replaces_nothing(small_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = TarShards.scan(small_shards)
    expected, _ = _batches(shards, 4, "torch")
    real_read, failures = TarShards.read, [OSError(5, "Input/output error")]

    def flaky(self: TarShards, index: int) -> bytes:
        if index == 4 and failures:
            raise failures.pop()
        return real_read(self, index)

    monkeypatch.setattr(TarShards, "read", flaky)
    actual, broken = _batches(shards, 4, "dali")
    assert broken == {} and not failures
    for a, b in zip(_joined(actual), _joined(expected), strict=True):
        assert torch.equal(a, b)
