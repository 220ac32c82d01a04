"""Commands started as a person starts them, and what their runs leave behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

import sadm_fast.train as train
from tests.support.ranks import clean_environment

TIMEOUT = 600.0


def start_line(script: Path, *arguments: str, ranks: int = 0) -> list[str]:
    """What a person types: plain python, or the DeepSpeed launcher for `ranks` processes."""
    if not ranks:
        return [sys.executable, str(script), *arguments]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks)]
    return [*launcher, "--master_port", str(free_port()), str(script), *arguments]


def train_here(*arguments: str) -> None:
    """train.py in this process, which has imported what it needs: a Program takes several seconds to be as far."""
    with mock.patch.dict(os.environ, clean_environment(), clear=True):
        assert train.main(list(arguments)) == 0


class Program:
    """A started command in a process group of its own, as on a terminal, with somebody reading what it says."""

    def __init__(self, argv: list[str], cwd: Path, environment: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            argv, cwd=cwd, env=clean_environment() | (environment or {}), text=True, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        pool = ThreadPoolExecutor(1)
        self._said = pool.submit(self.process.communicate)
        pool.shutdown(wait=False)

    def finish(self, code: int | None = 0) -> tuple[str, str]:
        """stdout and stderr, once the program and everybody it started have closed them."""
        try:
            out, err = self._said.result(timeout=TIMEOUT)
        except BaseException:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise
        found = self.process.returncode
        assert code is None or found == code, f"exit code {found}\n{out}\n{err}"
        return out, err

    def when(self, happens: Callable[[], bool], act: Callable[[], None]) -> None:
        """`act` once `happens` is true; fails if the program ends before."""
        deadline = time.monotonic() + TIMEOUT
        while not happens():
            assert time.monotonic() < deadline, f"nothing happened in {TIMEOUT:.0f} s"
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=0.02)
                pytest.fail(f"ended too early: {self.finish(None)}")
        act()

    def at_step(self, step: int, metrics: Path, send: Callable[[], None]) -> None:
        """`send` once the log shows the step; fails if the program ends before."""
        self.when(lambda: metrics.exists() and metrics.read_text().count("\n") >= step, send)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def last_checkpoint(run: Path) -> int:
    """The step of the newest complete checkpoint."""
    return max(json.loads(path.read_text())["step"] for path in run.glob("checkpoints/step-*/COMPLETE"))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def tree(root: Path) -> dict[str, bytes]:
    """Every file below root with its content."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def assert_same_state(a: Path, b: Path) -> None:
    """Two checkpoints hold the same weights, optimizer states and averages, bit for bit."""
    files = sorted(str(path.relative_to(a)) for path in a.rglob("*.safetensors"))
    assert files and files == sorted(str(path.relative_to(b)) for path in b.rglob("*.safetensors"))
    for name in files:
        first, second = load_file(a / name), load_file(b / name)
        assert first and first.keys() == second.keys(), name
        different = [key for key in first if not torch.equal(first[key], second[key])]
        assert not different, f"{name}: {different}"
    manifests = [json.loads((folder / "COMPLETE").read_text()) for folder in (a, b)]
    steps = [manifest["optimizer_steps"] for manifest in manifests]
    counters = [{k: v for k, v in manifest["state"].items() if k != "seconds"} for manifest in manifests]
    assert steps[0] == steps[1] and counters[0] == counters[1]
