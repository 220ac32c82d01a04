"""A job of two machines and one under SLURM: where it listens, how it ends when a machine dies, how it goes on.

The machines are network namespaces with a cable between them where that is allowed, and SLURM's commands are stand-ins.
"""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.support.hosts import Hosts, kill_all, listening, namespaces_allowed, two_loopback_addresses, two_namespaces
from tests.support.programs import Program, assert_same_state, free_port, last_checkpoint, lines
from tests.support.ranks import ROOT
from tests.test_train import write_images

SCRIPT = ROOT / "sadm_fast" / "train.py"
SBATCH = ROOT / "configs" / "cluster" / "slurm.sbatch"
STEPS, SAVED = 60, 20
# A rank finds out by its peer's closed connections, or by its patience; then comes the launcher, once a second.
PATIENCE, ENDED_WITHIN = 30.0, 60.0


def tiny(root: Path) -> Path:
    """A configuration of seconds, for two ranks."""
    path = root / "tiny.json"
    if not path.exists():
        tiny = {
            "name": "tiny",
            "data": {"path": str(write_images(root / "images")), "resolution": 8, "channels": 1, "threads": 1},
            "denoiser": {"patch_size": 4, "hidden_size": 16, "depth": 1, "num_heads": 2},
            "structure_encoder": {"width": 8, "feature_dim": 8, "pretrain": {"steps": 2, "batch": 16}},
            "game": {"mode": "sadm", "scope": "global"},
            "discriminator_optimizer": {"lr": 1e-4},
            "train": {"steps": STEPS, "micro_batch": 4, "log_every": 1, "sample_every": 1000,
                      "checkpoint_every": SAVED, "patience": PATIENCE},
            "sampling": {"steps": 2, "columns": 3, "rows": 2},
            "deepspeed": {"zero_optimization": {"stage": 2}},
        }  # fmt: skip
        path.write_text(json.dumps(tiny))
    return path


# --- SLURM


def stand_in(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/bash\n{text}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def sbatch(folder: Path, srun: str, *arguments: str) -> list[str]:
    """The script as SLURM starts it on the first node of a job, with `srun` as given; requeue.txt is what it queues."""
    folder.mkdir()
    stand_in(folder, "srun", srun)
    stand_in(folder, "scontrol", f'[ "$1" = show ] && echo localhost || echo "$@" >> {folder}/requeue.txt')
    job = {"SLURM_JOB_ID": str(free_port()), "SLURM_JOB_NODELIST": "n[1-1]", "SLURM_CPUS_PER_TASK": "1"}
    environment = {**job, "PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": sys.executable}
    variables = [f"{name}={value}" for name, value in environment.items()]
    return ["env", "-C", str(ROOT), *variables, "bash", str(SBATCH), *arguments]


# Tasks with the variables that SLURM gives them; srun ends with the highest of their codes.
TWO_TASKS = """
[ "$1" = --kill-on-bad-exit=0 ] && shift
for i in 0 1; do
  SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_NTASKS=2 SLURM_NNODES=1 SLURM_STEP_NUM_TASKS=2 "$@" & tasks[$i]=$!
done
highest=0
for task in ${tasks[@]}; do
  wait $task
  code=$?
  (( code > highest )) && highest=$code
done
exit $highest
"""


def run_under_slurm(root: Path) -> dict[str, Any]:
    run = root / "run"
    argv = sbatch(root / "bin", TWO_TASKS, "--config", str(tiny(root)), "--run-dir", str(run))
    program = Program(argv, root)
    seen: list[tuple[str, int]] = []
    program.at_step(2, run / "metrics.jsonl", lambda: seen.extend(listening(program)))
    program.finish()
    return {"run": str(run), "listening": seen, "queued": (root / "bin" / "requeue.txt").exists()}


# --- two machines


def commands(hosts: Hosts, port: int, root: Path) -> list[list[str]]:
    """What a person types on each machine."""
    hostfile = root / "hostfile"
    hostfile.write_text("".join(f"{name} slots=1\n" for name in hosts.names))
    deepspeed = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile), "--no_ssh"]
    meeting = ["--master_addr", hosts.addresses[0], "--master_port", str(port)]
    training = [str(SCRIPT), "--config", str(tiny(root)), "--run-dir", str(root / "run")]
    return [[*hosts.prefixes[i], *deepspeed, "--node_rank", str(i), *meeting, *training] for i in (0, 1)]


def kill_and_restart(
    root: Path, kind: Callable[[], AbstractContextManager[Hosts]], victim: int, silently: bool
) -> dict[str, Any]:
    """Train on two machines, kill one after the first checkpoint, start both again with the same commands.

    silently: the other one is not told, as after a loss of power: the cable is pulled first.
    """
    run, port = root / "run", free_port()
    with kind() as hosts:
        programs = [Program(command, root) for command in commands(hosts, port, root)]
        seen: list[list[tuple[str, int]]] = []

        def kill() -> None:
            seen.extend(listening(program) for program in programs)
            if silently:
                subprocess.run([*hosts.cable, "down"], check=True)
            kill_all(programs[victim])

        def saved() -> bool:
            for program in programs:
                if program.process.poll() is not None:
                    pytest.fail(f"ended too early: {program.finish(None)}")
            return any(run.glob("checkpoints/step-*/COMPLETE"))

        programs[1].when(saved, kill)
        started = time.monotonic()
        out, err = programs[1 - victim].finish(None)
        ended = {"after": time.monotonic() - started, "code": programs[1 - victim].process.returncode}
        programs[victim].finish(-signal.SIGKILL)
        reached, logged = last_checkpoint(run), len(lines(run / "metrics.jsonl"))
        if silently:
            subprocess.run([*hosts.cable, "up"], check=True)

        programs = [Program(command, root) for command in commands(hosts, port, root)]
        said = [program.finish()[0] for program in programs]
    return {
        "run": str(run), "addresses": hosts.addresses, "port": port, "listening": seen, "ended": ended,
        "out": out, "err": err, "reached": reached, "logged": logged, "said": said[0],
    }  # fmt: skip


def once(factory: pytest.TempPathFactory, name: str, work: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """What `work` found out; one call for all pytest processes."""
    root = factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    with FileLock(root / f"{name}.lock"):
        found = root / name / "found.json"
        if not found.parent.exists():
            found.parent.mkdir()
            found.write_text(json.dumps(work(found.parent)))
    result: dict[str, Any] = json.loads(found.read_text())  # not there if `work` has failed in another test
    return result


@pytest.fixture(scope="module")
def under_slurm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two tasks of one machine, to the end."""
    return once(tmp_path_factory, "under-slurm", run_under_slurm)


KINDS = {"namespaces": two_namespaces, "loopback": two_loopback_addresses}
BEST = "namespaces" if namespaces_allowed() else "loopback"


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(BEST, marks=pytest.mark.soak),
        pytest.param("loopback-rank0", marks=pytest.mark.soak),
        pytest.param(
            "namespaces-silently",
            marks=[pytest.mark.soak, pytest.mark.skipif(BEST == "loopback", reason="needs network namespaces")],
        ),
    ],
)
def two_machines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One machine is killed and the job started again: the second machine, or the one with rank 0."""
    kind, _, how = request.param.partition("-")

    def work(root: Path) -> dict[str, Any]:
        return kill_and_restart(root, KINDS[kind], victim=0 if how == "rank0" else 1, silently=how == "silently")

    return once(tmp_path_factory, request.param, work)


@pytest.mark.slow
def test_the_sbatch_script_trains(under_slurm: dict[str, Any]):
    assert last_checkpoint(Path(under_slurm["run"])) == STEPS
    assert not under_slurm["queued"]


# Each rank listens for gloo twice: all ranks, and all ranks again as DeepSpeed's own group. Rank 0 keeps the store.
GLOO_PORTS = 2


@pytest.mark.slow
def test_ranks_of_one_machine_listen_on_its_loopback_interface(under_slurm: dict[str, Any]):
    assert [address for address, _ in under_slurm["listening"]] == ["127.0.0.1"] * (1 + 2 * GLOO_PORTS)


@pytest.mark.slow
def test_two_machines_listen_where_they_were_asked_to(two_machines: dict[str, Any]):
    first, second = two_machines["listening"]
    at = two_machines["addresses"]
    if at[0].startswith("127."):  # gloo knows one loopback interface, with one address
        at = ["127.0.0.1"] * 2
    assert [address for address, _ in first] == [at[0]] * (1 + GLOO_PORTS)
    assert [address for address, _ in second] == [at[1]] * GLOO_PORTS
    assert [at[0], two_machines["port"]] in first


@pytest.mark.slow
def test_a_job_ends_when_one_of_its_machines_does(two_machines: dict[str, Any]):
    assert two_machines["ended"]["code"] != 0
    assert two_machines["ended"]["after"] < ENDED_WITHIN
    assert SAVED <= two_machines["reached"] <= two_machines["logged"] < STEPS  # in the middle, and after a checkpoint


@pytest.mark.slow
def test_started_again_it_ends_as_if_nothing_had_happened(two_machines: dict[str, Any], under_slurm: dict[str, Any]):
    assert f"Continuing {two_machines['run']} at step {two_machines['reached']}" in two_machines["said"]
    whole, killed = (Path(each["run"]) / "checkpoints" / f"step-{STEPS:06d}" for each in (under_slurm, two_machines))
    assert_same_state(killed, whole)


@pytest.mark.parametrize(
    ("srun", "code", "queued"),
    [
        ("exit 75", 75, True),
        ("kill -TERM $PPID; exit 75", 75, False),
        ("exit 0", 0, False),
        ("exit 2", 2, False),
        ("exit 137", 137, False),
    ],
    ids=["stopped", "cancelled", "finished", "user-error", "killed"],
)
def test_only_a_stopped_job_queues_again(tmp_path: Path, srun: str, code: int, queued: bool):
    argv = sbatch(tmp_path / "bin", srun)
    assert subprocess.run(argv).returncode == code
    asked = tmp_path / "bin" / "requeue.txt"
    number = next(variable.partition("=")[2] for variable in argv if variable.startswith("SLURM_JOB_ID="))
    assert (asked.read_text() if asked.exists() else None) == (f"requeue {number}\n" if queued else None)
