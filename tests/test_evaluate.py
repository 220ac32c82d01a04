"""evaluate.py on a finished run made by hand. What it prints, from two ranks, is in test_train.py."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from sadm_fast import evaluate
from sadm_fast.metrics import run_evaluation
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
