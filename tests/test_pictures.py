"""Where samples go: each is written whole, found again, and put together in the order of its number."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sadm_fast import pictures
from sadm_fast.errors import UserError
from sadm_fast.pictures import ClassFolders, GridFile, NpzFile, Output, picture_grid
from sadm_fast.scales import float_to_pixels, pixels_to_float

SHAPE = (3, 8, 8)
COUNT = 7
KINDS = ["grid.png", "samples.npz", "folder"]


def images(count: int = COUNT) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return pixels_to_float(torch.randint(0, 256, (count, *SHAPE), generator=generator, dtype=torch.uint8))


def output(path: Path, count: int = COUNT) -> Output:
    if path.suffix == ".png":
        return GridFile(path, count, 3, SHAPE)
    return NpzFile(path, count, SHAPE) if path.suffix == ".npz" else ClassFolders(path, ["a", "b"], count)


def add(there: Output, *numbers: int) -> None:
    """Add a run of samples; sample n is of class n modulo 2."""
    there.add(numbers[0], images()[list(numbers)], [n % 2 for n in numbers])


@pytest.mark.parametrize("name", KINDS)
def test_samples_come_in_any_order_and_are_found(tmp_path: Path, name: str) -> None:
    there = output(tmp_path / name)
    there.prepare()
    assert not there.in_use() and there.found() == []
    add(there, 4, 5, 6)
    add(there, 0)
    assert there.in_use() and output(tmp_path / name).found() == [0, 4, 5, 6]
    add(there, 1, 2, 3)
    there.finish()
    pixels = float_to_pixels(images())
    if name == "grid.png":
        expected = picture_grid(images(), 3).permute(1, 2, 0)
        assert np.array_equal(np.asarray(Image.open(there.path)), expected.numpy())
    elif name == "samples.npz":
        with np.load(there.path) as archive:
            assert archive.files == ["arr_0"] and archive["arr_0"].dtype == np.uint8
            assert np.array_equal(archive["arr_0"], pixels.permute(0, 2, 3, 1).numpy())
    else:
        for n in range(COUNT):
            picture = np.asarray(Image.open(there.path / "ab"[n % 2] / f"{n:06d}.png"))
            assert np.array_equal(picture, pixels[n].permute(1, 2, 0).numpy())
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("kept", [0, 40, -13], ids=["empty", "cut", "last"])
def test_a_file_that_is_not_whole_is_drawn_again(tmp_path: Path, name: str, kept: int) -> None:
    there = output(tmp_path / name)
    there.prepare()
    add(there, 0)
    add(there, 1)
    damaged = next(path for path in tmp_path.rglob("*0001.*"))
    # A PNG ends with 12 bytes without pixels, and before them the checksum of these.
    damaged.write_bytes(damaged.read_bytes()[:kept])
    assert there.found() == [0]
    add(there, 1)
    assert there.found() == [0, 1]


def test_a_sample_beyond_the_last_is_refused(tmp_path: Path) -> None:
    there = output(tmp_path / "folder")
    there.prepare()
    add(there, 4)
    with pytest.raises(UserError, match="folder: .*000004.png is none of 4 samples; remove it"):
        output(tmp_path / "folder", 4).found()


class Usage(NamedTuple):
    free: int


def test_a_disk_that_is_too_small_is_named_before_anything_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = 2 * COUNT * 3 * 8 * 8
    monkeypatch.setattr(pictures.shutil, "disk_usage", lambda _: Usage(needed))
    there = output(tmp_path / "x.npz")
    there.prepare()
    monkeypatch.setattr(pictures.shutil, "disk_usage", lambda _: Usage(needed - 1))
    with pytest.raises(UserError, match=r"--out .*x.npz: needs 0.0 GB, 0.0 GB are free"):
        there.prepare()
