"""Start a module as one or more ranks on this machine."""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from functools import cache
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


def run_ranks(module: str, world_size: int, *arguments: str, timeout: float = 900.0) -> list[str]:
    """`python -m module arguments...` as ranks 0 .. world_size-1: what each has said on both streams.

    AssertionError with that if one fails. One rank runs without any of a launcher's variables, as under plain `python`.
    All are forks of one process that has imported torch (rank_starter.py).
    """
    environments = [clean_environment()]
    store = None
    if world_size > 1:
        # This process holds the store the ranks meet at, so that nobody can take its port in between.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        environments = [{**clean_environment(), **meeting(store, rank, world_size)} for rank in range(world_size)]
    with tempfile.TemporaryDirectory() as folder:
        # Files, not pipes: a rank whose pipe is full would stop, and all the others with it.
        logs = [Path(folder) / str(rank) for rank in range(world_size)]
        request = {
            "module": module, "arguments": arguments, "environments": environments, "logs": [str(log) for log in logs]
        }  # fmt: skip
        codes = _started(request, timeout)
        said = [log.read_text(errors="replace") for log in logs]
    failed = [f"rank {rank}: exit code {code}\n{said[rank][-5000:]}" for rank, code in enumerate(codes) if code]
    assert not failed, "\n".join(failed)
    return said


@cache
def _starter() -> subprocess.Popen[str]:
    """This process's rank_starter.py; it ends with the process, whose end of the pipe closes."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.support.rank_starter"], cwd=ROOT, env=clean_environment(), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def _started(request: dict[str, Any], timeout: float) -> list[int]:
    """The exit codes of the processes that a request to the starter makes."""
    starter = _starter()
    assert starter.stdin is not None and starter.stdout is not None
    try:
        starter.stdin.write(json.dumps(request) + "\n")
        starter.stdin.flush()
        assert select.select([starter.stdout], [], [], timeout)[0], f"the ranks took longer than {timeout:.0f} s"
        codes: list[int] = json.loads(starter.stdout.readline())
    except BaseException:
        os.killpg(starter.pid, signal.SIGKILL)
        _starter.cache_clear()
        raise
    return codes


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
