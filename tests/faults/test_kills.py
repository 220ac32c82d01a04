"""SIGKILL of either rank at every point of a training: the same command ends where an uninterrupted run does."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from sadm_fast.cli import EXIT_LOST
from tests.faults.conftest import STEPS, VARIANTS, Row, Training
from tests.faults.faults import IN_A_SAVE, Fault, chains
from tests.support.programs import assert_same_state, lines
from tests.test_train import TIMES

Make = Callable[[str], tuple[Training, Path]]

CHAINS = chains(12)
KILLS = "SIGKILL | inside a save | of | steps lost | bits that differ in the end"
SHARDED = [variant for variant in VARIANTS if variant != "zero0"]


def assert_same_run(run: Path, whole: Path) -> None:
    """Weights, optimizer states, averages and counters bit for bit; the log but for its times."""
    last = f"checkpoints/step-{STEPS:06d}"
    assert_same_state(run / last, whole / last)
    logs = [
        [{key: value for key, value in line.items() if key not in TIMES} for line in lines(folder / "metrics.jsonl")]
        for folder in (run, whole)
    ]
    assert logs[0] == logs[1] and len(logs[0]) == STEPS
    leftovers = [path.name for path in (run / "checkpoints").iterdir() if not (path / "COMPLETE").exists()]
    assert leftovers == []


def killed_and_restarted(training: Training, whole: Path, run: Path, chain: list[Fault]) -> None:
    """Each start of the same command meets the next kill; the last one meets none."""
    for fault in chain:
        ended = training.run(run, fault)
        codes = [code for code, _ in ended]
        assert codes[fault.rank or 0] == -signal.SIGKILL, f"{fault}: not reached\n{ended}"
        # The other rank waits for it in a collective, or was through with all of them.
        (other,) = (end for rank, end in enumerate(ended) if rank != fault.rank)
        assert other[0] in (0, EXIT_LOST) and "Traceback" not in other[1], f"{fault}\n{other[1]}"
    training.run_well(run)
    assert_same_run(run, whole)


@pytest.mark.soak
@pytest.mark.parametrize("number", range(len(CHAINS)))
def test_kills_cost_nothing_but_time(training: Make, tmp_path: Path, row: Row, number: int):
    variant = SHARDED[number % len(SHARDED)]
    one, whole = training(variant)
    killed_and_restarted(one, whole, tmp_path / "run", CHAINS[number])
    for fault in CHAINS[number]:
        row(KILLS, fault, "yes" if fault in IN_A_SAVE else "no", f"run {number}, {variant}", 0, "none")


@pytest.mark.soak
def test_a_kill_inside_a_save_costs_nothing_but_time(training: Make, tmp_path: Path):
    one, whole = training("zero2-bf16")
    renamed = Fault("sadm_fast.run.checkpoint_writer:Path.rename", when="after")
    killed_and_restarted(one, whole, tmp_path / "run", [renamed])


def test_there_are_fifty_kill_points_and_half_of_them_inside_a_save():
    points = [point for chain in CHAINS for point in chain]
    assert len(set(points)) == len(points) >= 50
    assert sum(point in IN_A_SAVE for point in points) >= len(points) / 2
    assert {point.rank for point in points} == {0, 1}
