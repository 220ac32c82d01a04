"""Being asked to stop: by a signal, or by the death of the launcher.

SIGTERM, SIGUSR1 (what SLURM is often told to send before it takes a machine away) and Ctrl-C. Before there is anything
to save, the process ends at once; inside `deferred`, the request waits for the next step boundary. A handler must not
talk to other ranks: DeepSpeed's launcher signals them one after another.

A SIGTERM to the `deepspeed` command itself reaches no rank: it ends that process, and its children would train on with
nobody watching. So a rank that was started by DeepSpeed's launcher also stops when the launcher, or the command behind
it, is gone.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import psutil

_POLITE = (signal.SIGTERM, signal.SIGUSR1)


class Stopped(BaseException):
    """Asked to stop where nothing needs to be saved; not an Exception, so that no recovery swallows it."""


class StopRequest:
    """Whether this process has been asked to stop; made once, in the main thread, before the slow imports."""

    def __init__(self) -> None:
        self._asked = False
        self._deferred = False
        self._launcher = _launcher()
        for number in _POLITE:
            signal.signal(number, self._hear)

    @property
    def asked(self) -> bool:
        """By a signal that came in, or because the launcher has gone."""
        return self._asked or (self._launcher is not None and _parents() != self._launcher)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Requests inside and after are only noted, Ctrl-C inside too; a second Ctrl-C ends the process."""
        before = signal.signal(signal.SIGINT, self._hear)
        self.defer()
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def defer(self) -> None:
        """From now on a request is only noted: what is left must not be cut short by a launcher that ends all ranks."""
        self._deferred = True

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        if not self._deferred:
            raise Stopped
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _launcher() -> tuple[int, int] | None:
    """Process ids of DeepSpeed's local launcher and of what started it, if the launcher is this process's parent.

    Whoever else the parent is may come and go: a shell under nohup, for one.
    """
    with suppress(psutil.Error):
        if any("deepspeed.launcher.launch" in word for word in psutil.Process(os.getppid()).cmdline()):
            return _parents()
    return None


def _parents() -> tuple[int, int] | None:
    with suppress(psutil.Error):
        parent = psutil.Process(os.getppid())
        return parent.pid, parent.ppid()
    return None
