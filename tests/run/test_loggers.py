"""Loggers beside metrics.jsonl: TensorBoard itself, and the others by stand-ins of their modules."""

import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sadm_fast.config import check_config
from sadm_fast.errors import UserError
from sadm_fast.run.folder import RunFolder
from sadm_fast.run.log import TrainingLog
from sadm_fast.run.loggers import check_loggers, loggers

PICTURE = torch.zeros(3, 4, 5, dtype=torch.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    found = RunFolder(tmp_path / "run-7")
    found.claim(check_config({"name": "tiny", "data": {"path": "nowhere", "resolution": 8}}))
    return found


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stand-ins for both packages, and no environment that speaks to them."""
    found: dict[str, Any] = {name: MagicMock(spec_set=None) for name in ("wandb", "trackio")}
    for name, module in found.items():
        monkeypatch.setitem(sys.modules, name, module)
    for variable in ("WANDB_MODE", "TRACKIO_DIR"):
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    return found


def test_a_line_goes_to_every_logger_that_is_asked_for(folder: RunFolder, modules: dict[str, Any]) -> None:
    log = TrainingLog(folder, True, loggers(["tensorboard", "wandb", "trackio"], folder, {"seed": 3}, 0))
    log.write({"step": 10, "loss_denoise": 0.5, "mfu": None, "note": "text"})
    log.write_evaluation({"step": 20, "fid_pixels": 3.0})
    log.image("samples/ema", PICTURE, 20)
    log.close()
    assert [json.loads(line)["step"] for line in folder.metrics.read_text().splitlines()] == [10]
    board = EventAccumulator(str(folder.tensorboard)).Reload()
    assert [(e.step, e.value) for e in board.Scalars("train/loss_denoise")] == [(10, 0.5)]
    assert board.Tags()["images"] == ["samples/ema"]
    wandb, trackio = modules["wandb"], modules["trackio"]
    assert wandb.init.call_args.kwargs["name"] == wandb.init.call_args.kwargs["id"] == "run-7"
    assert wandb.init.call_args.kwargs["config"] == {"seed": 3} and wandb.init.call_args.kwargs["resume"] == "allow"
    numbers = [({"train/loss_denoise": 0.5}, 10), ({"evaluation/fid_pixels": 3.0}, 20)]
    logged = [(call.args[0], call.kwargs["step"]) for call in wandb.init.return_value.log.call_args_list]
    assert logged[:2] == numbers and list(logged[2][0]) == ["samples/ema"]
    assert wandb.Image.call_args.args[0].shape == (4, 5, 3)
    assert [(call.args[0], call.kwargs["step"]) for call in trackio.log.call_args_list] == numbers
    wandb.init.return_value.finish.assert_called_once()
    trackio.finish.assert_called_once()


def test_nothing_leaves_the_machine_unless_somebody_says_so(
    folder: RunFolder, modules: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    loggers(["wandb", "trackio"], folder, {}, 0)
    assert os.environ["WANDB_MODE"] == "offline" and os.environ["TRACKIO_DIR"] == str(folder.path / "trackio")
    monkeypatch.setenv("WANDB_MODE", "online")
    loggers(["wandb"], folder, {}, 0)
    assert os.environ["WANDB_MODE"] == "online"


def test_a_rank_without_loggers_writes_nothing(folder: RunFolder) -> None:
    log = TrainingLog(folder, writing=False)
    log.write({"step": 10})
    log.write_evaluation({"step": 10})
    log.image("samples/ema", PICTURE, 10)
    log.close()
    assert not folder.metrics.exists() and not folder.evaluations.exists()


def test_a_logger_that_is_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sadm_fast.run.loggers.find_spec", lambda name: None if name == "trackio" else ModuleType(name))
    check_loggers(["tensorboard", "wandb"])
    with pytest.raises(UserError, match="^logging=trackio: it is not installed; pip install trackio, or leave it out"):
        check_loggers(["trackio"])
