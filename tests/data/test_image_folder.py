"""Listing an image folder, and the line a person reads when it is laid out wrongly."""

import os
import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sadm_fast.data.checking import header_problem
from sadm_fast.data.image_folder import ImageFolder
from sadm_fast.data.source import PackedNames, printable
from sadm_fast.errors import UserError


def _refusal(root: Path) -> str:
    with pytest.raises(UserError) as caught:
        ImageFolder.scan(root)
    message = str(caught.value)
    assert message.isprintable()
    return message


def test_files_and_classes_are_sorted_by_name(small_folder: Path) -> None:
    folder = ImageFolder.scan(small_folder)
    assert folder.classes == ("cat", "dog")
    assert folder.files[0] == "cat/0.png" and folder.files[1] == "cat/1.png" and folder.files[-1] == "dog/3.png"
    assert folder.labels.dtype == np.int64 and folder.labels.tolist() == [0] * 7 + [1] * 4
    assert len(folder) == 11 and folder.where == str(small_folder)


def test_hidden_files_are_ignored(small_folder: Path) -> None:
    for name in (".DS_Store", "Thumbs.db", "Icon\r", "cat/.hidden", "cat/Thumbs.db", "dog/desktop.ini", "dog/Icon\r"):
        (small_folder / name).write_text("x")
    (small_folder / ".cache").mkdir()
    assert len(ImageFolder.scan(small_folder)) == 11


def test_extensions_in_capitals_are_images(small_folder: Path) -> None:
    shutil.copy(small_folder / "cat/0.png", small_folder / "cat/NEW.PNG")
    assert "cat/NEW.PNG" in ImageFolder.scan(small_folder).files


@pytest.mark.parametrize(
    "path, problem",
    [
        ("nowhere", "no such folder"),
        ("file/below", "no such folder"),
        ("nul\0", "no such folder"),
        ("n" * 300, "cannot be read (File name too long)"),
        ("f/" * 3000, "cannot be read (File name too long)"),
        ("line\nend", "no such folder"),
        ("loop", "is a link to loop, in a circle"),
        ("gone", "is a link to /unmounted/disk, where nothing is"),
        ("file", "is a file, not a folder"),
        ("pipe", "is a file, not a folder"),
    ],
)
def test_path_that_is_no_folder(tmp_path: Path, path: str, problem: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "gone").symlink_to("/unmounted/disk")
    os.mkfifo(tmp_path / "pipe")
    assert f": {problem}; give a folder" in _refusal(tmp_path / path)


def test_empty_folder(tmp_path: Path) -> None:
    assert f"{tmp_path}: the folder is empty" in _refusal(tmp_path)


def test_images_without_class_folders(small_folder: Path) -> None:
    message = _refusal(small_folder / "cat")
    assert "has no class subfolders" in message and "'0.png'" in message


def test_class_without_images(small_folder: Path) -> None:
    (small_folder / "emu").mkdir()
    assert "class 'emu' has no images" in _refusal(small_folder)


def test_folder_inside_a_class(small_folder: Path) -> None:
    (small_folder / "cat/kittens").mkdir()
    assert "class 'cat' contains the folder 'kittens'" in _refusal(small_folder)


@pytest.mark.parametrize(
    "name, problem",
    [
        ("notes.txt", "is not an image by its name"),
        ("line\nend.txt", "is not an image by its name"),
        ("line\rend\udcff.txt", "is not an image by its name"),
        ("pipe.png", "is a named pipe, not an image"),
        ("socket.png", "is a socket, not an image"),
        ("device.png", "is a device, not an image"),
        ("loop", "is a link to loop, in a circle"),
        ("gone", "is a link to /unmounted/disk, where nothing is"),
    ],
)
def test_what_lies_in_a_class_and_is_no_image(small_folder: Path, name: str, problem: str) -> None:
    path = small_folder / "dog" / name
    _put_there(path)
    assert _refusal(small_folder).startswith(f"{printable(str(path))}: {problem}; ")


@pytest.mark.parametrize(
    "name, problem",
    [
        ("labels\n.csv", r"the file 'labels\n.csv' lies beside the class folders"),
        ("pipe", "the named pipe 'pipe' lies beside the class folders"),
        ("loop", "'loop' is a link to loop, in a circle; remove it"),
        ("gone", "'gone' is a link to /unmounted/disk, where nothing is; remove it, or bring back"),
    ],
)
def test_what_lies_beside_the_classes_and_is_none(small_folder: Path, name: str, problem: str) -> None:
    _put_there(small_folder / name)
    assert f"data.path={small_folder}: {problem}" in _refusal(small_folder)


def test_links_to_class_folders_that_are_gone(tmp_path: Path) -> None:
    _put_there(tmp_path / "gone")
    assert "'gone' is a link to /unmounted/disk, where nothing is" in _refusal(tmp_path)


def _put_there(path: Path) -> None:
    """Make at `path` what its name says."""
    if path.stem == "pipe":
        os.mkfifo(path)
    elif path.stem == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(os.path.relpath(path))  # their paths are short
    elif path.stem in ("device", "loop", "gone"):
        path.symlink_to({"device": "/dev/null", "loop": "loop", "gone": "/unmounted/disk"}[path.stem])
    else:
        path.touch()


def test_folder_without_permission(small_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_scandir = os.scandir

    def refuse(path: Path) -> Any:  # chmod does not stop root, who runs tests in containers
        if path.name == "dog":
            raise PermissionError(13, "Permission denied", str(path))
        return real_scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert f"no permission to list {small_folder / 'dog'}" in _refusal(small_folder)


def test_folder_that_cannot_be_listed(small_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> Any:
        raise OSError(116, "Stale file handle", str(path))

    monkeypatch.setattr(os, "scandir", fail)
    assert f"{small_folder} cannot be listed (Stale file handle)" in _refusal(small_folder)


@pytest.mark.parametrize(
    "name, reason",
    [
        ("pipe.png", "cannot be read (OSError: it is a named pipe, not a plain file)"),
        ("loop.png", "cannot be read: it is a link to loop.png, in a circle"),
        ("gone.png", "cannot be read: it is a link to /unmounted/disk, where nothing is"),
    ],
)
def test_an_image_that_turned_into_something_else_is_broken_and_never_waited_for(
    small_folder: Path, name: str, reason: str
) -> None:
    (small_folder / "dog/0.png").rename(small_folder / "dog" / name)
    folder = ImageFolder.scan(small_folder)
    (index,) = (i for i in range(11) if folder.path(i).endswith(name))
    (small_folder / "dog" / name).unlink()
    path = small_folder / "dog" / name
    if name == "pipe.png":
        os.mkfifo(path)
    else:
        path.symlink_to("loop.png" if name == "loop.png" else "/unmounted/disk")
    problem = header_problem(folder, index, None)
    assert problem and problem.startswith(f"{path}: {reason}")


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
