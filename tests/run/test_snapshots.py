"""Averages kept beyond their checkpoints, and others made of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sadm_fast.engine.masters import Fragment
from sadm_fast.errors import UserError
from sadm_fast.run.checkpoint_writer import CheckpointWriter, Snapshots
from sadm_fast.run.manifest import EMA_FILE
from sadm_fast.run.snapshots import reconstructed, snapshot_name, snapshots_in
from sadm_fast.run.state import TrainState

LONG, SHORT = EMA_FILE, "ema-power-0.05.safetensors"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Checkpoints of steps 5, 10, .. 40, of which only the newest is left, and snapshots of every second one."""
    value = torch.zeros(6)
    names = {LONG: snapshot_name(0.1), SHORT: snapshot_name(0.05)}
    averages: dict[str, Any] = {
        LONG: lambda: [Fragment("weight", 0, value)],
        SHORT: lambda: [Fragment("weight", 0, value + 0.5)],
    }
    writer = CheckpointWriter(
        tmp_path / "checkpoints", {}, averages, {"weight": (3, 2)}, identity={}, fixed={"grid": torch.ones(2)},
        keep_last=1, snapshots=Snapshots(tmp_path / "snapshots", 10, names), say=print,
    )  # fmt: skip
    for step in range(5, 41, 5):
        value.fill_(float(step))
        writer.save(TrainState(step=step, ema_updates=step))
        writer.finish()
        writer.followed(step + 1)
    writer.close()
    return tmp_path


def values(state: dict[str, Tensor]) -> dict[str, list[float]]:
    return {name: value.unique().tolist() for name, value in state.items()}


def test_each_is_a_whole_state_and_stays_when_its_checkpoint_goes(run: Path) -> None:
    (last,) = (run / "checkpoints").glob("step-*")
    assert values(load_file(last / LONG)) == {"weight": [40.0], "grid": [1.0]}
    assert values(load_file(last / SHORT)) == {"weight": [40.5], "grid": [1.0]}
    found = snapshots_in(run / "snapshots", last=100)
    assert [(s.step, s.std) for s in found] == [(step, std) for step in (10, 20, 30, 40) for std in (0.05, 0.1)]
    assert values(load_file(found[0].path)) == {"weight": [10.5], "grid": [1.0]}
    assert [s.step for s in snapshots_in(run / "snapshots", last=25)] == [10, 10, 20, 20]


def test_another_length_holds_everything_that_a_state_holds(run: Path) -> None:
    state = reconstructed(run / "snapshots", 40, 0.08)
    assert state["weight"].shape == (3, 2) and state["weight"].dtype == torch.float32
    # What is the same in all averages is so in theirs: weights sum to 1.
    assert state["grid"].tolist() == pytest.approx([1.0, 1.0], abs=1e-6)
    assert values(reconstructed(run / "snapshots", 20, 0.1))["weight"] == pytest.approx([20.0], abs=1e-4)


def test_what_cannot_be_made_is_one_line(run: Path) -> None:
    folder = run / "snapshots"
    with pytest.raises(UserError, match=r"holds no snapshots .* up to step 5; train with train.ema_snapshot_every"):
        reconstructed(folder, 5, 0.1)
    with pytest.raises(UserError, match=r"EMA length 0.25 at step 4000: 8 snapshots \(lengths 0.05, 0.1\) give"):
        reconstructed(folder, 4000, 0.25)
    (folder / snapshot_name(0.1).format(step=30)).write_bytes(b"cut off")
    with pytest.raises(UserError, match=r"step-000030.safetensors: cannot be read"):
        reconstructed(folder, 40, 0.08)
    save_file({"weight": torch.zeros(3)}, folder / snapshot_name(0.1).format(step=30))
    with pytest.raises(UserError, match=r"cannot be read"):
        reconstructed(folder, 40, 0.08)
