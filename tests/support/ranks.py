"""Start a module as one or more ranks on this machine."""

import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from torch.distributed import TCPStore

ROOT = Path(__file__).resolve().parents[2]


def clean_environment() -> dict[str, str]:
    """The environment for a child that is to be a rank or a launcher, whatever this process was started by."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME")
    kept = {name: value for name, value in os.environ.items() if name not in launcher}
    return kept | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def meeting(store: TCPStore, rank: int, world_size: int) -> dict[str, str]:
    """What tells a rank on this machine where to meet the others: at a store that somebody else keeps."""
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(world_size),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
    }


def run_ranks(module: str, world_size: int, *arguments: str, timeout: float = 900.0) -> None:
    """`python -m module arguments...` as ranks 0 .. world_size-1; AssertionError with their output if one fails.

    One rank runs without any of a launcher's variables, as under plain `python`.
    """
    command = [sys.executable, "-m", module, *arguments]
    environments = [clean_environment()]
    store = None
    if world_size > 1:
        # This process holds the store the ranks meet at, so that nobody can take its port in between.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        environments = [{**clean_environment(), **meeting(store, rank, world_size)} for rank in range(world_size)]
    with ExitStack() as stack:
        # Files, not pipes: a rank whose pipe is full would stop, and all the others with it.
        logs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in environments]
        ranks = [
            subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
            for environment, log in zip(environments, logs, strict=True)
        ]
        try:
            _wait(ranks, time.monotonic() + timeout)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        failed = []
        for rank, (process, log) in enumerate(zip(ranks, logs, strict=True)):
            log.seek(0)
            if process.returncode:
                failed.append(f"rank {rank}: exit code {process.returncode}\n{log.read()[-5000:]}")
    assert not failed, "\n".join(failed)


def _wait(ranks: list[subprocess.Popen[bytes]], deadline: float) -> None:
    """Until all have ended, or one has failed: the others would wait for it."""
    while any(process.poll() is None for process in ranks) and not any(process.returncode for process in ranks):
        assert time.monotonic() < deadline, "the ranks took too long"
        with suppress(subprocess.TimeoutExpired):
            next(process for process in ranks if process.returncode is None).wait(timeout=0.2)


def folder_of_run(factory: pytest.TempPathFactory, module: str, world_size: int, part: str = "") -> Path:
    """Where `run_once` leaves what the ranks found; shared by all pytest processes."""
    root = factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    return root / f"{module}-{world_size}{part}"


def run_once(
    factory: pytest.TempPathFactory,
    module: str,
    world_size: int,
    phases: tuple[str, ...] = (),
    timeout: float = 900.0,
    part: str = "",
) -> list[dict[str, Any]]:
    """What every rank of `python -m module FOLDER` left in FOLDER/rank-N.pt; one launch for all pytest processes.

    With `phases`, one launch each, in order, as `python -m module FOLDER PHASE`; with a `part` of the module's cases,
    one launch as `python -m module FOLDER PART`.
    """
    folder = folder_of_run(factory, module, world_size, part)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            for phase in [[phase] for phase in phases] or [[part] if part else []]:
                run_ranks(module, world_size, str(folder), *phase, timeout=timeout)
    # After a launch that failed, the files are not there, and every test that wants them says so.
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(world_size)]
