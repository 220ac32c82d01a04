"""Finding broken images, remembering what was found, and the line a person reads about it."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sadm_fast.data import checking
from sadm_fast.data.checking import CheckReport, check, checked, forget, header_problem, require_sound
from sadm_fast.data.image_folder import ImageFolder
from sadm_fast.errors import UserError


def _problem(root: Path, name: str, resolution: int | None = 8) -> str:
    """What a look at every header says, which must be about that one image."""
    folder = ImageFolder.scan(root)
    problems = [problem for i in range(len(folder)) if (problem := header_problem(folder, i, resolution))]
    assert len(problems) == 1 and problems[0].startswith(f"{root / name}: ") and "\n" not in problems[0]
    return problems[0].removeprefix(f"{root / name}: ")


def test_sound_images_have_no_problem(small_folder: Path) -> None:
    folder = ImageFolder.scan(small_folder)
    assert not any(header_problem(folder, i, 8) for i in range(11)) and not check(folder, threads=1).problems


def test_file_that_is_not_an_image_by_its_contents(small_folder: Path) -> None:
    (small_folder / "dog/2.png").write_text("no picture")
    assert _problem(small_folder, "dog/2.png").startswith("is not an image")


def test_file_of_zero_bytes(small_folder: Path) -> None:
    (small_folder / "dog/2.png").write_bytes(b"")
    assert _problem(small_folder, "dog/2.png").startswith("is an empty file")


def test_image_smaller_than_the_crop(small_folder: Path) -> None:
    Image.new("L", (9, 7)).save(small_folder / "dog/3.png")
    problem = _problem(small_folder, "dog/3.png")
    assert problem.startswith("9x7 pixels is smaller than data.resolution=8") and "data.enlarge=true" in problem


@pytest.mark.parametrize("resolution", [None, 0])
def test_without_a_limit_any_size_is_sound(small_folder: Path, resolution: int | None) -> None:
    Image.new("L", (1, 1)).save(small_folder / "dog/3.png")
    assert header_problem(ImageFolder.scan(small_folder), 10, resolution) is None


def test_image_too_large_to_decode(small_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (30, 30)).save(small_folder / "dog/3.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    assert _problem(small_folder, "dog/3.png").startswith("is too large to decode")


def test_file_without_permission(small_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_read = ImageFolder.read

    def refuse(self: ImageFolder, index: int) -> bytes:  # chmod does not stop root, who runs tests in containers
        if self.path(index).endswith("dog/1.png"):
            raise PermissionError(13, "Permission denied", self.path(index))
        return real_read(self, index)

    monkeypatch.setattr(ImageFolder, "read", refuse)
    assert _problem(small_folder, "dog/1.png").startswith("no permission to read it")


@pytest.mark.parametrize("name, options", [("a.png", {}), ("a.jpg", {"quality": 90}), ("b.jpg", {"progressive": True})])
def test_pixels_that_are_cut_off_are_found_by_decoding(
    photo: Callable[..., Image.Image], make_folder: Any, name: str, options: dict[str, Any]
) -> None:
    root = make_folder({f"cat/{name}": photo(64, 64, seed=1)}, **options)
    path = root / "cat" / name
    folder = ImageFolder.scan(root)
    assert not check(folder, threads=1).problems
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 9 // 10])
    assert header_problem(folder, 0, 8) is None  # the header is whole
    ((name, reason),) = check(folder, threads=1).problems
    assert name == str(path) and reason.startswith("the image is damaged")


def test_whatever_a_decoder_raises_is_a_problem_of_the_image(
    small_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OverflowError("header")

    monkeypatch.setattr(Image.Image, "convert", fail)
    reasons = {reason for _, reason in check(ImageFolder.scan(small_folder), threads=1).problems}
    assert reasons == {"the image is damaged (OverflowError: header); remove it or replace it"}


@pytest.fixture
def broken_folder(small_folder: Path) -> Path:
    """The small folder with cat/5.png empty, dog/0.png cut off and cat/2.png of 20x6 pixels."""
    (small_folder / "cat/5.png").write_bytes(b"")
    path = small_folder / "dog/0.png"
    path.write_bytes(path.read_bytes()[:60])
    Image.new("L", (20, 6)).save(small_folder / "cat/2.png")
    return small_folder


@pytest.mark.parametrize("threads", [1, 3])
def test_a_check_lists_every_broken_image_in_order_and_the_smallest(broken_folder: Path, threads: int) -> None:
    report = check(ImageFolder.scan(broken_folder), threads=threads)
    assert report.images == 11
    names = [str(broken_folder / "cat/5.png"), str(broken_folder / "dog/0.png")]
    assert [name for name, _ in report.problems] == names and report.problem_indices == (5, 7)
    assert report.problems[0][1].startswith("is an empty file") and "damaged" in report.problems[1][1]
    assert report.smallest_side == 6 and report.smallest_name == str(broken_folder / "cat/2.png")


def test_progress_counts_up_to_all_images(small_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "_CHUNK", 4)
    seen: list[tuple[int, int]] = []
    check(ImageFolder.scan(small_folder), threads=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(4, 11), (8, 11), (11, 11)]


def test_a_folder_of_nothing_but_broken_images(small_folder: Path) -> None:
    for path in small_folder.glob("*/*.png"):
        path.write_bytes(b"")
    report = check(ImageFolder.scan(small_folder), threads=2)
    assert len(report.problems) == 11 and report.smallest_side == 0 and report.smallest_name == ""


def _no_check(*_: object, **__: object) -> CheckReport:
    pytest.fail("checked again")


def test_a_report_is_remembered(broken_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ImageFolder.scan(broken_folder)
    report = checked(folder, threads=2)
    monkeypatch.setattr(checking, "check", _no_check)
    assert checked(folder, threads=2) == report


def test_forget_makes_the_next_one_look_again(small_folder: Path) -> None:
    folder = ImageFolder.scan(small_folder)
    assert not checked(folder, threads=2).problems
    path = small_folder / "cat/3.png"
    with path.open("r+b") as file:  # overwritten in place: the documented limit
        file.truncate(50)
    assert not checked(folder, threads=2).problems
    forget(folder)
    assert [name for name, _ in checked(folder, threads=2).problems] == [str(path)]


def test_a_repaired_image_is_noticed_even_if_overwritten_in_place(broken_folder: Path) -> None:
    folder = ImageFolder.scan(broken_folder)
    assert len(checked(folder, threads=2).problems) == 2
    (broken_folder / "cat/5.png").write_bytes((broken_folder / "cat/4.png").read_bytes())
    assert len(checked(folder, threads=2).problems) == 1
    Image.new("L", (20, 9)).save(broken_folder / "cat/2.png")
    assert checked(folder, threads=2).smallest_side == 8


def test_another_list_of_images_is_another_report(small_folder: Path) -> None:
    assert checked(ImageFolder.scan(small_folder), threads=2).images == 11
    (small_folder / "cat/0.png").unlink()
    assert checked(ImageFolder.scan(small_folder), threads=2).images == 10


def test_a_file_replaced_under_its_name_is_looked_at_again(small_folder: Path) -> None:
    checked(ImageFolder.scan(small_folder), threads=2)
    (small_folder / "new.png").write_bytes(b"")
    (small_folder / "new.png").rename(small_folder / "cat/4.png")
    os.utime(small_folder / "cat", ns=(0, 1))  # file systems' clocks are coarse: as if time had passed since
    assert len(checked(ImageFolder.scan(small_folder), threads=2).problems) == 1


@pytest.mark.parametrize("content", [b"", b"\x80", b"[1]", b'{"version": 1}', b'{"version": 0, "images": 11}', None])
def test_a_foreign_or_damaged_report_is_made_anew(small_folder: Path, cache: Path, content: bytes | None) -> None:
    folder = ImageFolder.scan(small_folder)
    report = checked(folder, threads=2)
    (path,) = (cache / "checked").iterdir()
    if content is None:  # a report of something else under this name
        fields = json.loads(path.read_text())
        content = json.dumps(fields | {"images": 12, "smallest_index": -1}).encode()
    path.write_bytes(content)
    assert checked(folder, threads=2) == report


def test_a_cache_that_cannot_be_written_is_done_without(small_folder: Path, cache: Path) -> None:
    cache.write_text("a file in its place")
    folder = ImageFolder.scan(small_folder)
    assert checked(folder, threads=2).images == 11
    forget(folder)


def test_nothing_is_written_beside_the_report(small_folder: Path, cache: Path) -> None:
    before = sorted(small_folder.rglob("*"))
    checked(ImageFolder.scan(small_folder), threads=2)
    assert sorted(small_folder.rglob("*")) == before
    assert len(list((cache / "checked").iterdir())) == 1


def _refusal(root: Path, resolution: int = 8, enlarge: bool = False, policy: Any = "refuse") -> str | None:
    try:
        require_sound(ImageFolder.scan(root), resolution, enlarge=enlarge, policy=policy, threads=2)
    except UserError as error:
        assert "\n" not in str(error)
        return str(error)
    return None


def test_sound_images_are_let_through(small_folder: Path) -> None:
    assert _refusal(small_folder) is None and _refusal(small_folder, policy="skip") is None


def test_refusing_names_the_first_the_number_and_the_ways_out(broken_folder: Path) -> None:
    message = _refusal(broken_folder)
    assert message and f"{broken_folder}/cat/5.png: is an empty file" in message
    assert "and 1 more of 11 images" in message
    assert f"encode.py --check {broken_folder}" in message and "--set data.broken=skip" in message


def test_too_small_is_refused_unless_it_may_be_enlarged(small_folder: Path) -> None:
    message = _refusal(small_folder, resolution=9)
    assert message and "cat/0.png: its shorter side of 8 pixels is smaller than data.resolution=9" in message
    assert "data.enlarge=true" in message
    assert _refusal(small_folder, resolution=9, enlarge=True) is None


def test_one_check_answers_every_resolution(small_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _refusal(small_folder, resolution=8) is None
    monkeypatch.setattr(checking, "check", _no_check)
    assert _refusal(small_folder, resolution=9)


def test_skipping_lets_some_broken_images_through(broken_folder: Path) -> None:
    assert _refusal(broken_folder, policy="skip") is None


def test_skipping_refuses_when_most_are_broken(small_folder: Path) -> None:
    for path in small_folder.glob("cat/*.png"):
        path.write_bytes(b"")
    message = _refusal(small_folder, policy="skip")
    assert message and "cat/0.png: is an empty file" in message and "and 6 more of 11 looked at" in message


def test_skipping_refuses_when_most_are_too_small_unless_enlarged(small_folder: Path) -> None:
    message = _refusal(small_folder, resolution=9, policy="skip")
    assert message and "8x8 pixels is smaller than data.resolution=9" in message
    assert _refusal(small_folder, resolution=9, enlarge=True, policy="skip") is None


def test_skipping_looks_at_an_even_sample_with_both_ends(small_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "_MAX_SAMPLED", 3)  # images 0, 5 and 10
    for name in ("cat/1.png", "cat/2.png", "dog/3.png"):
        (small_folder / name).write_bytes(b"")
    assert _refusal(small_folder, policy="skip") is None
    (small_folder / "cat/5.png").write_bytes(b"")
    message = _refusal(small_folder, policy="skip")
    assert message and "cat/5.png" in message and "1 more of 3" in message


def test_skipping_never_decodes_everything(small_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "check", _no_check)
    assert _refusal(small_folder, policy="skip") is None
