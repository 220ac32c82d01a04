"""Signals, poison, hangs, slow ranks, full disks and clocks that jump, in real trainings on two ranks."""

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from sadm_fast.cli import EXIT_LOST, EXIT_STOPPED, EXIT_USER_ERROR
from tests.faults.conftest import CHECKPOINT_EVERY, STEPS, VARIANTS, Row, Training
from tests.faults.faults import ENGINE, TRAINER, WRITER, Fault
from tests.faults.test_kills import assert_same_run
from tests.support.programs import Program, last_checkpoint, lines

Make = Callable[[str], tuple[Training, Path]]
FAULTS = "fault | what became of it"

pytestmark = pytest.mark.soak


def launcher(program: Program) -> psutil.Process:
    """DeepSpeed's launcher of this machine; `program` is the command that started it."""
    (found,) = psutil.Process(program.process.pid).children()
    return found


def ranks(program: Program) -> list[psutil.Process]:
    return sorted(launcher(program).children(), key=lambda process: int(process.environ()["RANK"]))


Whom = Callable[[Program], int]

# SIGTERM to whom, and the exit code: DeepSpeed's own launcher has one code for every end by a signal, and the
# `deepspeed` command does not catch it. The ranks' code is EXIT_STOPPED each time; the test asks the launcher's log.
SIGTERMS: dict[str, tuple[Whom, int]] = {
    "the deepspeed command": (lambda program: program.process.pid, -signal.SIGTERM),
    "its launcher": (lambda program: launcher(program).pid, 1),
    "rank 0": (lambda program: ranks(program)[0].pid, EXIT_STOPPED),
    "rank 1": (lambda program: ranks(program)[1].pid, EXIT_STOPPED),
}


@pytest.mark.parametrize("whom", SIGTERMS)
def test_sigterm_saves_one_checkpoint_and_ends_every_process(training: Make, tmp_path: Path, row: Row, whom: str):
    one, whole = training("zero2-bf16")
    run, never = tmp_path / "run", (f"train.checkpoint_every={10 * STEPS}", "data.loader=torch")
    slowly = Fault(f"{TRAINER}:draw_batch", rank=1, action="slow", again=True)
    program = one.launch(run, slowly, overrides=never)
    choose, code = SIGTERMS[whom]
    family: list[psutil.Process] = []

    def send() -> None:
        family.extend([launcher(program), *ranks(program)])
        os.kill(choose(program), signal.SIGTERM)

    program.at_step(3, run / "metrics.jsonl", send)
    out, err = program.finish(code)
    assert psutil.wait_procs(family, timeout=60)[1] == []
    assert "Traceback" not in out + err
    reached = last_checkpoint(run)
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{reached:06d}"] and reached < STEPS
    assert f"stopped at step {reached} of {STEPS}; the same command continues" in out
    if whom != "its launcher":
        assert f"return code = {EXIT_STOPPED}" in out + err
    one.launch(run, overrides=never).finish()
    assert_same_run(run, whole)
    row(FAULTS, f"SIGTERM to {whom}", f"one checkpoint, all processes gone, exit code {code}, resumed bit for bit")


def poisoned(one: Training, run: Path, *faults: Fault) -> list[int]:
    """Steps that were skipped in a training with these faults; both players must have skipped the same ones."""
    out, _ = one.launch(run, *faults).finish()
    manifest = json.loads((run / f"checkpoints/step-{STEPS:06d}/COMPLETE").read_text())
    skipped = [int(step) for step in re.findall(r"step (\d+): a loss or gradient is not finite; both players", out)]
    assert manifest["optimizer_steps"] == {"denoiser": STEPS - len(skipped), "discriminator": STEPS - len(skipped)}
    assert lines(run / "metrics.jsonl")[-1]["skipped_steps"] == len(skipped)
    return skipped


@pytest.mark.parametrize(
    ("what", "target", "variant"),
    [
        ("the data", f"{TRAINER}:draw_batch", "zero2-bf16"),
        ("the denoising loss", f"{ENGINE}:predict", "zero2-bf16"),
        *(("the denoiser's gradient", f"{ENGINE}:structure_distance", variant) for variant in VARIANTS),
        *(("the discriminator's gradient", f"{ENGINE}:discriminator_loss", variant) for variant in VARIANTS),
    ],
)
def test_a_nan_on_one_rank_is_skipped_by_both_players_on_all_ranks(
    training: Make, tmp_path: Path, row: Row, what: str, target: str, variant: str
):
    one, _ = training(variant)
    assert poisoned(one, tmp_path / "run", Fault(target, 5, rank=1, when="after", action="nan")) == [5]
    row(FAULTS, f"NaN in {what} of rank 1, {variant}", "both players skip the step on all ranks, counted")


def test_nans_that_do_not_end_end_the_run_and_name_the_last_good_checkpoint(training: Make, tmp_path: Path, row: Row):
    one, _ = training("zero2-bf16")
    run = tmp_path / "run"
    program = one.launch(run, Fault(f"{TRAINER}:draw_batch", 6, rank=1, when="after", action="nan", again=True))
    _, err = program.finish(EXIT_USER_ERROR)
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "10 steps in a row, up to step 15," in line and "lower the learning rate" in line
    named = run / "checkpoints" / f"step-{last_checkpoint(run):06d}"
    assert str(named) in line
    row(FAULTS, "NaN in every step from the 6th on", "ends after 10 in a row, exit code 2, names the last checkpoint")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs_ends_the_job(training: Make, tmp_path: Path, row: Row, rank: int):
    one, whole = training("zero2-bf16")
    run = tmp_path / "run"
    fault = Fault(f"{ENGINE}:discriminator_loss", 7, rank=rank, action="hang")
    _, err = one.launch(run, fault, overrides=("train.patience=8",)).finish(EXIT_LOST)
    assert re.search(r"error: rank \d: no progress for 8 s \(in step 7\)", err)
    assert "in hang" in err  # where it was
    one.run_well(run)
    assert_same_run(run, whole)
    row(FAULTS, f"rank {rank} hangs", "the job ends itself after train.patience, exit code 1, resumed bit for bit")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_frozen_by_the_system_ends_the_job(training: Make, tmp_path: Path, row: Row, rank: int):
    """It cannot say anything itself; the others do, and the launcher kills it after its own 30 seconds."""
    one, whole = training("zero2-bf16")
    run = tmp_path / "run"
    slowly = Fault(f"{TRAINER}:draw_batch", rank=1, action="slow", again=True)
    program = one.launch(run, slowly, overrides=("train.patience=8",))
    program.at_step(3, run / "metrics.jsonl", lambda: ranks(program)[rank].suspend())
    _, err = program.finish(EXIT_LOST)
    assert f"error: rank {1 - rank}: no progress for 8 s" in err
    one.run_well(run)
    assert_same_run(run, whole)
    row(FAULTS, f"rank {rank} is frozen (SIGSTOP)", "the other rank ends the job after train.patience, exit code 1")


def test_a_rank_that_dies_is_one_line_from_the_others(training: Make, tmp_path: Path, row: Row):
    one, _ = training("zero2-bf16")
    program = one.launch(tmp_path / "run", Fault(f"{TRAINER}:draw_batch", 3, rank=1))
    out, err = program.finish(code=None)
    assert program.process.returncode not in (0, EXIT_STOPPED, EXIT_USER_ERROR)
    assert "error: rank 0: another rank is gone (" in err and "the same command continues" in err
    assert "Traceback" not in out + err
    row(FAULTS, "a rank dies", "the other one says so in one line and ends, at once")


def test_an_error_that_one_rank_alone_meets_is_said(training: Make, tmp_path: Path, row: Row):
    one, _ = training("zero2-bf16")
    _, err = one.launch(tmp_path / "run", Fault(f"{TRAINER}:draw_batch", 3, rank=1, action="complain")).finish(
        code=None
    )
    assert "error: only here" in err
    row(FAULTS, "an error on one rank alone", "that rank says it")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_costs_one_checkpoint_and_no_step(training: Make, tmp_path: Path, row: Row, rank: int):
    one, whole = training("zero1")
    run = tmp_path / "run"
    last = STEPS // CHECKPOINT_EVERY  # the save before the last one
    _, err = one.launch(run, Fault(f"{WRITER}:save_file", 2, rank=rank, action="fail")).finish()
    assert f"checkpoint of step {CHECKPOINT_EVERY}: not saved (" in err and "No space left on device" in err
    assert last > 2
    assert_same_run(run, whole)
    row(FAULTS, f"disk full in a save of rank {rank}", "one line, the checkpoint before stays, training goes on")


def test_jumping_clocks_and_a_slow_rank_do_not_matter(training: Make, tmp_path: Path, row: Row):
    one, whole = training("zero2-bf16")
    slowly = Fault(f"{ENGINE}:predict", rank=1, action="slow", again=True)
    for name, program in (
        ("clock", one.launch(tmp_path / "clock", SADM_CLOCK="jumps")),
        ("slow", one.launch(tmp_path / "slow", slowly)),
    ):
        program.finish()
        assert_same_run(tmp_path / name, whole)
    row(FAULTS, "the clock jumps by up to a year, either way", "nothing")
    row(FAULTS, "a rank is several times slower", "nothing but time")
