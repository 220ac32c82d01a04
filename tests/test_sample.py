"""sample.py on a finished run made by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sadm_fast import drawing, sample
from tests.support.finished_run import finished_run
from tests.support.programs import tree
from tests.test_train import CLASSES


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return finished_run(tmp_path)


def test_a_grid_has_a_column_a_class(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "grid.png"
    assert sample.main([str(run), "--classes", "circle", "triangle", "--count", "6", "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    width, height = Image.open(out).size
    assert height > width  # two columns, three rows
    assert sample.main([str(run), "--count", "6", "--out", str(out)]) == 0
    assert Image.open(out).size[0] > width


@pytest.mark.parametrize(("name", "kind"), [("a.png", "PNG"), ("a.JPG", "JPEG"), ("a.jpeg", "JPEG")])
def test_a_grid_is_what_its_name_says(run: Path, tmp_path: Path, name: str, kind: str):
    out = tmp_path / "new" / "folder" / name
    assert sample.main([str(run), "--count", "3", "--out", str(out)]) == 0
    assert Image.open(out).format == kind
    assert sorted(path.name for path in out.parent.iterdir()) == [name, f"{name}.provenance.json"]


def test_the_batch_changes_no_pixel(run: Path, tmp_path: Path):
    for batch in ("2", "5", "1000"):
        arguments = ["--count", "7", "--classes", "circle", "--classes", "square", "triangle", "--batch", batch]
        assert sample.main([str(run), *arguments, "--out", str(tmp_path / f"{batch}.png")]) == 0
    assert len({(tmp_path / f"{batch}.png").read_bytes() for batch in ("2", "5", "1000")}) == 1


def test_pictures_are_written_as_they_are_drawn(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    generate, batches = drawing.generate, iter(range(2))

    def interrupted(*arguments: Any, **options: Any) -> torch.Tensor:
        if next(batches, None) is None:
            raise KeyboardInterrupt
        return generate(*arguments, **options)

    monkeypatch.setattr(drawing, "generate", interrupted)
    assert sample.main([str(run), "--count", "1000000000", "--batch", "2", "--folder", str(tmp_path / "out")]) == 130
    assert len(list((tmp_path / "out").rglob("*.png"))) == 4


def test_single_pictures_go_into_class_folders(run: Path, tmp_path: Path):
    assert sample.main([str(run), "--count", "4", "--batch", "3", "--folder", str(tmp_path / "out")]) == 0
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.png")}
    assert found == {"circle/000000.png", "square/000001.png", "triangle/000002.png", "circle/000003.png"}


def test_a_tilde_is_the_home_folder(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(run)
    for arguments, made in (([], "run/samples.png"), (["--out=~/x.png"], "x.png"), (["--folder=~/x"], "x")):
        assert sample.main(["~/run", "--count=1", *arguments]) == 0
        assert (tmp_path / made).exists()
    assert not list(run.glob("~*"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "~no-such-user/x.png"], "~no-such-user/x.png: there is no home folder"),
        (["--classes", "pentagon"], "pentagon: the run was trained on images of circle, square, triangle"),
        (["--count", "0"], "--count 0: must be at least 1"),
        (["--count", "many"], "--count many: must be a whole number"),
        (["--count", "1000000"], "--count 1000000: a grid of"),
        (["--batch", "-1"], "--batch -1: must be at least 1"),
        (["--steps", "0"], "--steps 0: must be at least 1"),
        (["--steps", "10000000000"], "--steps 10000000000: must be at most"),
        (["--seed", "-1"], "--seed -1: must be at least 0"),
        (["--seed", str(2**70)], f"--seed {2**70}: must be at most"),
        (["--guidance-scale", "nan"], "--guidance-scale nan: must be from 0"),
        (["--guidance-scale", "inf"], "--guidance-scale inf: must be from 0"),
        (["--guidance-scale", "-1"], "--guidance-scale -1: must be from 0"),
        (["--guidance-scale", "x"], "--guidance-scale x: must be a number"),
        (["--out", "/proc/none/x.png"], "--out /proc/none/x.png: cannot be written"),
        (["--out", "x.gif"], "--out x.gif: must end in .png, .jpg, .jpeg or .npz"),
        (["--out", "x"], "--out x: must end in .png, .jpg, .jpeg or .npz"),
        (["--out", ""], '--out "": must be a path'),
        (["--out", "x.png", "--folder", "x"], "--folder not allowed with argument --out"),
        (["--folder", "/proc/none"], "--folder /proc/none: cannot be used"),
        (["--folder", __file__], f"--folder {__file__}: cannot be used (File exists)"),
        (["--folder", str(Path(__file__).parent)], "is not empty"),
        (["--unknown"], "unrecognized arguments: --unknown"),
    ],
)
def test_a_wrong_option_is_one_line_before_anything_is_drawn(
    run: Path,
    arguments: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(run.parent)
    monkeypatch.setattr(drawing, "generate", None)
    before = tree(run.parent)
    assert sample.main([str(run), *arguments]) == 2
    out, error = capsys.readouterr()
    assert words in error and error.count("\n") == 1 and not out
    assert tree(run.parent) == before


def test_a_folder_in_the_place_of_the_picture_is_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "x.png").mkdir()
    assert sample.main([str(run), "--out", str(tmp_path / "x.png")]) == 2
    assert "x.png: cannot be written (Is a directory)" in capsys.readouterr().err


def test_samples_that_are_not_finite_are_no_picture(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(drawing, "generate", lambda *_, **__: torch.full((3, 1, 8, 8), torch.nan))
    assert sample.main([str(run), "--count", "3", "--out", str(tmp_path / "x.png")]) == 2
    assert "not finite at --guidance-scale 1, --steps 2" in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("name", ["a/b", "..", ""])
def test_a_class_is_a_folder_below_the_one_asked_for(run: Path, tmp_path: Path, name: str):
    (run / "run.json").write_text(json.dumps({"classes": [name, "square", "triangle"]}))
    assert sample.main([str(run), "--count", "3", "--folder", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["class-0", "square", "triangle"]


def test_a_damaged_checkpoint_is_not_sampled_from(run: Path, capsys: pytest.CaptureFixture[str]):
    weights = next(run.glob("checkpoints/step-*")) / "ema.safetensors"
    save_file({"other": torch.zeros(1)}, weights)
    assert sample.main([str(run)]) == 2
    assert "no whole checkpoint" in capsys.readouterr().err


def test_classes_without_images_are_not_drawn(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (run / "run.json").write_text(json.dumps({"classes": list(CLASSES), "empty_classes": [1]}))
    assert sample.main([str(run), "--count", "4", "--folder", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["circle", "triangle"]
    assert sample.main([str(run), "--classes", "square"]) == 2
    assert "--classes square: the run was trained on images of circle, triangle" in capsys.readouterr().err
