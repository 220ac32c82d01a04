"""evaluate.py on a finished run made by hand. What it prints, from two ranks, is in test_train.py."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sadm_fast import evaluate
from sadm_fast.metrics import run_evaluation
from sadm_fast.models import ViT
from sadm_fast.ranks import launch
from tests.support.finished_run import finished_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return finished_run(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--samples", "1"], "--samples 1: must be at least 2"),
        (["--samples", "nan"], "--samples nan: must be a whole number"),
        (["--steps", "0"], "--steps 0: must be at least 1"),
        (["--steps", "10000000000"], "--steps 10000000000: must be at most"),
        (["--data", ""], '--data "": must be a path'),
    ],
)
def test_a_wrong_option_is_one_line(
    tmp_path: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
):
    assert evaluate.main([str(tmp_path), *arguments]) == 2
    out, err = capsys.readouterr()
    assert words in err and err.count("\n") == 1 and not out


def test_a_folder_without_a_run_is_named_before_the_ranks_meet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(launch, "distributed", None)
    assert evaluate.main([str(tmp_path)]) == 2
    assert f"{tmp_path}: holds no run" in capsys.readouterr().err


def test_samples_that_cannot_be_scored_are_one_line(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    @contextmanager
    def alone(*, deepspeed: bool) -> Iterator[launch.Place]:
        yield launch.Place(0, 1, torch.device("cpu"))

    monkeypatch.setattr(launch, "distributed", alone)
    monkeypatch.setattr(run_evaluation, "generate", lambda *_, **__: torch.full((12, 1, 8, 8), torch.nan))
    assert evaluate.main([str(run)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {run}: cannot be scored: the moments hold NaN") and err.count("\n") == 1


@contextmanager
def alone(*, deepspeed: bool) -> Iterator[launch.Place]:
    yield launch.Place(0, 1, torch.device("cpu"))


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        ("size=1", "--sweep size=1: must be one of guidance, steps, ema and its values"),
        ("guidance=", "--sweep guidance=: must be one of"),
        ("guidance=1,big", "--sweep guidance=1,big: guidance=big is no value of it"),
        ("steps=0", "--sweep steps=0: steps=0 is no value of it"),
    ],
)
def test_a_sweep_that_is_none_is_one_line(run: Path, sweep: str, words: str, capsys: pytest.CaptureFixture[str]):
    assert evaluate.main([str(run), "--sweep", sweep]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


def test_a_sweep_is_a_table_with_the_best_marked_and_a_file(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(launch, "distributed", alone)
    scores = tmp_path / "scores.json"
    sweeps = ["--sweep", "guidance=1,4", "--sweep", "steps=1,2"]
    assert evaluate.main([str(run), "--samples", "12", *sweeps, "--json", str(scores)]) == 0
    rows = json.loads(scores.read_text())["scores"]
    assert [(row["steps"], row["guidance"]) for row in rows] == [("1", "1"), ("1", "4"), ("2", "1"), ("2", "4")]
    assert [row["sampling"]["guidance"]["scale"] for row in rows] == [1.0, 4.0, 1.0, 4.0]
    assert all(set(row["kid"]) == set(row["floor"]) == set(row["recall"]) for row in rows)
    table = capsys.readouterr().out.splitlines()
    head = next(i for i, line in enumerate(table) if line.split()[:2] == ["guidance", "steps"])
    column = table[head].split().index("fid_pixels")
    best = min(range(4), key=lambda i: rows[i]["fid_pixels"])
    starred = [line.split()[column].endswith("*") for line in table[head + 1 : head + 5]]
    assert starred[best] and table[head + 5].split()[0] == "floor"


def test_other_images_have_a_judge_of_their_own(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(launch, "distributed", alone)
    assert evaluate.main([str(run), "--samples", "12"]) == 0
    own = run / "pretrained" / "judge.safetensors"
    before = own.read_bytes()
    other = tmp_path / "other"
    for i, name in enumerate(("0", "1")):
        (other / name).mkdir(parents=True)
        for k in range(12):
            picture = np.full((8, 8), 20 * k + 5 * i, np.uint8)
            Image.fromarray(picture).save(other / name / f"{k}.png")
    assert evaluate.main([str(run), "--samples", "12", "--data", str(other)]) == 0
    assert own.read_bytes() == before and len(list((run / "pretrained").glob("on-*/judge.safetensors"))) == 1


def test_a_judge_from_a_file_stands_beside_the_others_and_one_without_is_refused_first(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(launch, "distributed", None)
    assert evaluate.main([str(run), "--judges", "inception"]) == 2
    err = capsys.readouterr().err
    assert "--judges inception: needs pt_inception-2015-12-05-6726825d.pth" in err and err.count("\n") == 1
    monkeypatch.setattr(launch, "distributed", alone)
    vit = ViT(3, patch_size=14, width=8, depth=1, position_grid=2, input_size=28)
    torch.save(vit.state_dict(), tmp_path / "vit.pt")
    scores = tmp_path / "scores.json"
    assert (
        evaluate.main([str(run), "--samples", "8", "--judges", f"vit={tmp_path / 'vit.pt'}", "--json", str(scores)])
        == 0
    )
    row = json.loads(scores.read_text())["scores"][0]
    assert row["fd_vit"] >= 0 and set(row["kid"]) == {"fid_classifier", "fid_random", "fid_pixels", "fd_vit"}
    assert "8 samples are fewer than the features of fd_vit (8) plus one" in capsys.readouterr().out
