"""Listing an image folder, and the line a person reads when it is laid out wrongly."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sadm_fast.data.image_folder import ImageFolder
from sadm_fast.data.source import PackedNames
from sadm_fast.errors import UserError


def _refusal(root: Path) -> str:
    with pytest.raises(UserError) as caught:
        ImageFolder.scan(root)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_files_and_classes_are_sorted_by_name(small_folder: Path) -> None:
    folder = ImageFolder.scan(small_folder)
    assert folder.classes == ("cat", "dog")
    assert folder.files[0] == "cat/0.png" and folder.files[1] == "cat/1.png" and folder.files[-1] == "dog/3.png"
    assert folder.labels.dtype == np.int64 and folder.labels.tolist() == [0] * 7 + [1] * 4
    assert len(folder) == 11 and folder.where == str(small_folder)


def test_hidden_files_are_ignored(small_folder: Path) -> None:
    for name in (".DS_Store", "Thumbs.db", "cat/.hidden", "cat/Thumbs.db", "dog/desktop.ini"):
        (small_folder / name).write_text("x")
    (small_folder / ".cache").mkdir()
    assert len(ImageFolder.scan(small_folder)) == 11


def test_extensions_in_capitals_are_images(small_folder: Path) -> None:
    shutil.copy(small_folder / "cat/0.png", small_folder / "cat/NEW.PNG")
    assert "cat/NEW.PNG" in ImageFolder.scan(small_folder).files


def test_missing_folder(tmp_path: Path) -> None:
    assert f"{tmp_path / 'nowhere'}: no such folder" in _refusal(tmp_path / "nowhere")


def test_file_instead_of_a_folder(small_folder: Path) -> None:
    assert "0.png: is a file, not a folder" in _refusal(small_folder / "cat/0.png")


def test_empty_folder(tmp_path: Path) -> None:
    assert f"{tmp_path}: the folder is empty" in _refusal(tmp_path)


def test_images_without_class_folders(small_folder: Path) -> None:
    message = _refusal(small_folder / "cat")
    assert "has no class subfolders" in message and "'0.png'" in message


def test_file_beside_the_class_folders(small_folder: Path) -> None:
    (small_folder / "labels.csv").write_text("x")
    assert "'labels.csv' lies beside the class folders" in _refusal(small_folder)


def test_class_without_images(small_folder: Path) -> None:
    (small_folder / "emu").mkdir()
    assert "class 'emu' has no images" in _refusal(small_folder)


def test_folder_inside_a_class(small_folder: Path) -> None:
    (small_folder / "cat/kittens").mkdir()
    assert "class 'cat' contains the folder 'kittens'" in _refusal(small_folder)


def test_file_that_is_not_an_image_by_its_name(small_folder: Path) -> None:
    (small_folder / "dog/notes.txt").write_text("x")
    assert "dog/notes.txt: is not an image by its name" in _refusal(small_folder)


def test_folder_without_permission(small_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_scandir = os.scandir

    def refuse(path: Path) -> Any:
        if path.name == "dog":
            raise PermissionError(13, "Permission denied", str(path))
        return real_scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert f"no permission to list {small_folder / 'dog'}" in _refusal(small_folder)


def test_the_first_class_with_a_problem_is_named(small_folder: Path) -> None:
    (small_folder / "dog/notes.txt").write_text("x")
    (small_folder / "ant").mkdir()
    assert "class 'ant' has no images" in _refusal(small_folder)


def test_a_file_is_read_and_named_by_its_path(small_folder: Path) -> None:
    folder = ImageFolder.scan(small_folder)
    path = small_folder / "dog/0.png"
    assert folder.path(7) == folder.name(7) == str(path)
    assert folder.read(7) == path.read_bytes()
    path.unlink()
    with pytest.raises(FileNotFoundError):
        folder.read(7)


def test_a_name_with_a_line_end_is_one_line_in_messages(small_folder: Path) -> None:
    (small_folder / "dog/0.png").rename(small_folder / "dog/0\n.png")
    folder = ImageFolder.scan(small_folder)
    assert folder.name(7).endswith("dog/0\\n.png") and Path(folder.path(7)).exists()


def test_a_subset_keeps_the_order_asked_for_and_all_classes(small_folder: Path) -> None:
    part = ImageFolder.scan(small_folder).subset(np.array([10, 0]))
    assert list(part.files) == ["dog/3.png", "cat/0.png"] and part.labels.tolist() == [1, 0]
    assert part.classes == ("cat", "dog") and len(part) == 2


def test_the_stamp_changes_with_what_is_in_a_class(small_folder: Path) -> None:
    folder = ImageFolder.scan(small_folder)
    before = folder.stamp()
    assert folder.stamp() == before
    (small_folder / "dog/3.png").unlink()
    os.utime(small_folder / "dog", ns=(0, 1))  # as if time had passed since
    assert folder.stamp() != before


def test_the_fingerprint_is_what_it_was_when_checkpoints_were_written() -> None:
    files = ("cat/0.png", "cat/K\u00e4tzchen.png", "dog/\udcff\udcfe.jpg")
    folder = ImageFolder(Path("/x"), PackedNames.from_iterable(files), np.array([0, 0, 1]), ("cat", "dog"))
    assert folder.fingerprint() == "ce42e73d1f1720e245921e3a5eeb2cc4632897698a108787e81a1531a268642b"


def test_fingerprint_follows_names_and_labels_not_the_place(small_folder: Path, tmp_path: Path) -> None:
    before = ImageFolder.scan(small_folder).fingerprint()
    moved = small_folder.rename(tmp_path / "moved")
    assert ImageFolder.scan(moved).fingerprint() == before
    (moved / "cat/6.png").rename(moved / "cat/7.png")
    assert ImageFolder.scan(moved).fingerprint() != before
    (moved / "cat/7.png").rename(moved / "dog/7.png")
    (moved / "dog").rename(moved / "eel")
    assert ImageFolder.scan(moved).fingerprint() != before
