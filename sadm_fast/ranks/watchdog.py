"""Ends a rank that makes no progress, so that a job with a rank that hangs, or has silently gone, ends too."""

import faulthandler
import os
import sys
import threading
import time
from types import TracebackType
from typing import Self


class Watchdog:
    """Use as a context manager around a loop that calls `alive` at every turn.

    When `patience` seconds go by without one, the process says where it is stuck and ends itself at once, whatever its
    main thread is waiting for: usually a collective, because another rank does not come. Its end closes its
    connections, and the launcher ends the other ranks. Time is monotonic: a clock that is set does not matter.

    Args:
        patience: seconds; must be longer than the longest step, evaluation or compilation.
        doing: what comes first, for the message.
        code: the exit code.
    """

    def __init__(self, patience: float, rank: int, doing: str, code: int = 1) -> None:
        self._patience, self._rank, self._code = patience, rank, code
        self._over = threading.Event()
        self._doing, self._since = doing, time.monotonic()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._since = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()

    def alive(self, doing: str) -> None:
        """Progress was made; `doing` says what comes now, for the message."""
        self._doing, self._since = doing, time.monotonic()

    def _watch(self) -> None:
        while True:
            left = self._since + self._patience - time.monotonic()
            if left <= 0:
                self._end()
            if self._over.wait(left):
                return

    def _end(self) -> None:
        sys.stderr.write(
            f"error: rank {self._rank}: no progress for {self._patience:g} s ({self._doing}); this rank or another one"
            " hangs, or is gone. The same command continues from the last checkpoint; train.patience is the limit."
            " Where this rank was:\n"
        )
        sys.stderr.flush()
        faulthandler.dump_traceback(all_threads=True)
        os._exit(self._code)
