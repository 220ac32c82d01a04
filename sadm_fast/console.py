"""What a person sees in the terminal: sentences, and a bar on a terminal or a plain line now and then in a pipe."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_PLAIN_EVERY_S = 10.0


class _Terminal(RichConsole):
    """Its reader may go (a closed ssh, a pipe into `head`); a training of weeks goes on in silence."""

    def on_broken_pipe(self) -> None:
        with suppress(SystemExit):  # stdout is /dev/null by then
            super().on_broken_pipe()


class Console:
    """Speaks on rank 0 and is silent elsewhere."""

    def __init__(self, rank: int = 0) -> None:
        self._speaks = rank == 0
        self._console = _Terminal(highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """One line; above the bar, if one is shown."""
        if self._speaks:
            self._console.print(text, markup=False)

    def complain(self, text: str) -> None:
        """One line on stderr, from any rank: what went wrong here may be known nowhere else."""
        with suppress(BrokenPipeError):
            sys.stderr.write(text + "\n" if self._speaks else f"(another rank) {text}\n")
            sys.stderr.flush()

    def bar(self, description: str, total: int, start: int = 0, *, brief: bool = False) -> "Bar":
        """Progress over `total` steps; use as a context manager. brief: in a pipe, say nothing of quick work."""
        return Bar(self._console if self._speaks else None, description, total, start, brief)

    @contextmanager
    def progress(self, description: str) -> Iterator[Callable[[int, int], None]]:
        """Yields report(done, total); a bar appears with its first call, so work that is skipped shows none."""
        with ExitStack() as stack:
            bars: list[Bar] = []

            def report(done: int, total: int) -> None:
                if not bars:
                    bars.append(stack.enter_context(self.bar(description, total, brief=True)))
                bars[0].at(done)

            yield report


class Bar:
    """Progress of one long piece of work."""

    def __init__(self, console: RichConsole | None, description: str, total: int, start: int, brief: bool) -> None:
        self._console, self._description, self._total = console, description, total
        self._said = time.monotonic()
        self._says_the_end = not brief
        self._progress: Progress | None = None
        self._task: Any = None
        if console is not None and console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=console,
            )
            self._task = self._progress.add_task(description, total=total, completed=start, note="")

    def __enter__(self) -> "Bar":
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def at(self, done: int, note: str = "") -> None:
        """`done` of the steps are behind us; `note` says how it goes."""
        if self._progress is not None:
            self._progress.update(self._task, completed=done, note=note)
        elif self._console is not None:
            now = time.monotonic()
            if (done == self._total and self._says_the_end) or now - self._said >= _PLAIN_EVERY_S:
                self._said, self._says_the_end = now, True
                self._console.print(f"{self._description} {done}/{self._total} {note}".rstrip(), markup=False)
