"""Listing, checking and splitting an image folder, and the line a person reads when it is wrong."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sadm_fast.data.image_folder import ImageFolder, pixel_problem
from sadm_fast.errors import UserError


def _refusal(root: Path, resolution: int = 8) -> str:
    with pytest.raises(UserError) as caught:
        ImageFolder.scan(root).check(resolution)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_files_and_classes_are_sorted_by_name(small_folder: Path) -> None:
    folder = ImageFolder.scan(small_folder)
    assert folder.classes == ("cat", "dog")
    assert folder.files[:2] == ("cat/0.png", "cat/1.png") and folder.files[-1] == "dog/3.png"
    assert folder.labels.dtype == np.int64 and folder.labels.tolist() == [0] * 7 + [1] * 4
    assert len(folder) == 11
    folder.check(8)


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


def test_file_that_is_not_an_image_by_its_contents(small_folder: Path) -> None:
    (small_folder / "dog/2.png").write_text("no picture")
    assert "dog/2.png: is not an image" in _refusal(small_folder)


def test_file_of_zero_bytes(small_folder: Path) -> None:
    (small_folder / "dog/2.png").write_bytes(b"")
    assert "dog/2.png: is an empty file" in _refusal(small_folder)


def test_image_smaller_than_the_crop(small_folder: Path) -> None:
    Image.new("L", (9, 7)).save(small_folder / "dog/3.png")
    assert "dog/3.png: 9x7 pixels is smaller than data.resolution=8" in _refusal(small_folder)


def test_broken_link(small_folder: Path) -> None:
    (small_folder / "dog/9.png").symlink_to(small_folder / "gone.png")
    assert "dog/9.png: cannot be read (FileNotFoundError" in _refusal(small_folder)


def test_format_that_only_one_loader_reads(small_folder: Path) -> None:
    Image.new("L", (8, 8)).save(small_folder / "dog/3.png", format="GIF")
    assert "dog/3.png: is GIF, which the loaders do not read" in _refusal(small_folder)


def test_sixteen_bits(small_folder: Path) -> None:
    Image.fromarray(np.zeros((8, 8), dtype=np.uint16)).save(small_folder / "dog/3.png")
    assert "dog/3.png: has pixel mode I;16, not 8 bits" in _refusal(small_folder)


def test_animation(small_folder: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(small_folder / "dog/9.webp", save_all=True, append_images=frames[1:])
    assert "dog/9.webp: is animated" in _refusal(small_folder)


def test_file_without_permission(small_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_open = Image.open

    def refuse(path: str, *arguments: object) -> Image.Image:  # chmod does not stop root, who runs tests in containers
        if path.endswith("dog/1.png"):
            raise PermissionError(13, "Permission denied", path)
        return real_open(path, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Image, "open", refuse)
    assert "dog/1.png: no permission to read it" in _refusal(small_folder)


def test_folder_without_permission(small_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_scandir = os.scandir

    def refuse(path: Path) -> Any:
        if path.name == "dog":
            raise PermissionError(13, "Permission denied", str(path))
        return real_scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert f"no permission to list {small_folder / 'dog'}" in _refusal(small_folder)


def test_the_first_problem_is_shown_and_the_others_counted(small_folder: Path) -> None:
    for name in ("cat/5.png", "dog/0.png", "dog/2.png"):
        (small_folder / name).write_bytes(b"")
    message = _refusal(small_folder)
    assert "cat/5.png: is an empty file" in message and "(and 2 more of 11 images checked)" in message


def test_a_large_folder_is_sampled_evenly_with_both_ends(small_folder: Path) -> None:
    folder = ImageFolder.scan(small_folder)
    (small_folder / "cat/1.png").write_bytes(b"")
    folder.check(8, max_checked=3)  # looks at images 0, 5 and 10
    (small_folder / "dog/3.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"dog/3\.png"):
        folder.check(8, max_checked=3)


def test_damaged_pixels_are_found_by_decoding(small_folder: Path) -> None:
    path = small_folder / "cat/0.png"
    assert pixel_problem(str(path), 8) is None
    path.write_bytes(path.read_bytes()[:60])
    ImageFolder.scan(small_folder).check(8)  # the header is whole
    problem = pixel_problem(str(path), 8)
    assert problem and "cat/0.png: the image is damaged" in problem


def test_split_holds_out_the_same_share_of_every_class(small_folder: Path) -> None:
    folder = ImageFolder.scan(small_folder)
    rest, held = folder.split(0.25, seed=4)
    assert np.bincount(held.labels).tolist() == [2, 1] and np.bincount(rest.labels).tolist() == [5, 3]
    assert sorted(rest.files + held.files) == sorted(folder.files)
    assert rest.classes == held.classes == folder.classes
    for part in (rest, held):
        assert [part.classes[label] for label in part.labels] == [name.split("/")[0] for name in part.files]


def test_split_depends_on_the_seed_only(small_folder: Path) -> None:
    folder = ImageFolder.scan(small_folder)
    held = [folder.split(0.4, seed)[1].files for seed in (1, 1, 2, 3)]
    assert held[0] == held[1] and len(set(held)) > 1


def test_split_leaves_every_class_an_image(small_folder: Path) -> None:
    rest, _ = ImageFolder.scan(small_folder).split(0.99, seed=0)
    assert np.bincount(rest.labels).tolist() == [1, 1]


def test_split_that_would_hold_out_nothing(small_folder: Path) -> None:
    with pytest.raises(UserError, match="too few to hold out 0.01"):
        ImageFolder.scan(small_folder).split(0.01, seed=0)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5])
def test_split_fraction_out_of_range(small_folder: Path, fraction: float) -> None:
    with pytest.raises(ValueError, match=f"fraction={fraction}"):
        ImageFolder.scan(small_folder).split(fraction, seed=0)


def test_fingerprint_follows_names_and_labels_not_the_place(small_folder: Path, tmp_path: Path) -> None:
    before = ImageFolder.scan(small_folder).fingerprint()
    moved = small_folder.rename(tmp_path / "moved")
    assert ImageFolder.scan(moved).fingerprint() == before
    (moved / "cat/6.png").rename(moved / "cat/7.png")
    assert ImageFolder.scan(moved).fingerprint() != before
    (moved / "cat/7.png").rename(moved / "dog/7.png")
    (moved / "dog").rename(moved / "eel")
    assert ImageFolder.scan(moved).fingerprint() != before
