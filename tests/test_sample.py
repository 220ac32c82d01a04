"""sample.py and evaluate.py on a finished run made by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sadm_fast import sample
from sadm_fast.build import build_denoiser
from sadm_fast.config import check_config
from sadm_fast.engine.masters import Fragment, trainable_shapes
from sadm_fast.run.checkpoint_writer import CheckpointWriter
from sadm_fast.run.folder import RunFolder
from tests.support.ranks import ROOT, clean_environment
from tests.test_train import CLASSES, write_images


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with one whole checkpoint of an untrained denoiser."""
    training = {"steps": 3, "batch": 8}
    config = check_config(
        {
            "name": "tiny",
            "data": {"path": str(write_images(tmp_path / "images")), "resolution": 8, "threads": 1},
            "denoiser": {"hidden_size": 16, "depth": 1, "num_heads": 2},
            "sampling": {"steps": 2},
            "evaluate": {"every": 10, "samples": 12, "batch": 8, "steps": 2, "judge": training},
        }
    )
    folder = RunFolder(tmp_path / "run")
    folder.claim(config)
    folder.facts.write_text(json.dumps({"classes": list(CLASSES)}))
    model = build_denoiser(config, len(CLASSES))
    average = [Fragment(n, 0, p.detach().flatten()) for n, p in model.named_parameters() if p.requires_grad]
    writer = CheckpointWriter(
        folder.checkpoints, {}, lambda: average, trainable_shapes(model), identity={}, keep_last=1, say=print
    )  # fmt: skip
    writer.save(10, {})
    writer.finish()
    writer.close()
    return folder.path


def test_a_grid_has_a_column_a_class(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "grid.png"
    assert sample.main([str(run), "--classes", "circle", "triangle", "--count", "6", "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    width, height = Image.open(out).size
    assert height > width  # two columns, three rows
    assert sample.main([str(run), "--count", "6", "--out", str(out)]) == 0
    assert Image.open(out).size[0] > width


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
        (["--classes", "pentagon"], "pentagon: the run has circle, square, triangle"),
        (["--count", "0"], "--count 0"),
        (["--steps", "0"], "--steps 0"),
        (["--out", "/proc/none/x.png"], "cannot be written"),
    ],
)
def test_bad_arguments_end_in_one_line(run: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]):
    assert sample.main([str(run), *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_a_damaged_checkpoint_is_not_sampled_from(run: Path, capsys: pytest.CaptureFixture[str]):
    weights = next(run.glob("checkpoints/step-*")) / "ema.safetensors"
    save_file({"other": torch.zeros(1)}, weights)
    assert sample.main([str(run)]) == 2
    assert "no whole checkpoint" in capsys.readouterr().err


@pytest.mark.slow
def test_evaluate_prints_the_three_distances(run: Path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "sadm_fast" / "evaluate.py"), str(run), "--samples", "9"],
        capture_output=True, text=True, env=clean_environment(), check=True, timeout=300,
    )  # fmt: skip
    result = json.loads(done.stdout[done.stdout.index("{") :])
    assert result["samples"] == 9 and result["step"] == 10
    assert all(result[name] > 0 for name in ("fid_classifier", "fid_random", "fid_pixels"))
