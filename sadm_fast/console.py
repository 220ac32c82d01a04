"""Messages to the person at the terminal: lines of text, and progress as a bar (in a pipe: a line every 10 seconds)."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import TextIOWrapper
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


def accept_any_text() -> None:
    """Let stdout and stderr take any text, whatever their encoding, and whether they are open or not.

    What they cannot show is escaped. File names may hold bytes that are no text in any encoding.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # closed: the next file opened would take its place
        pass
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", errors="backslashreplace"))  # noqa: SIM115
        elif isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class _Terminal(RichConsole):
    """A terminal whose reader may leave (a closed ssh, a pipe into `head`): the training continues in silence."""

    def on_broken_pipe(self) -> None:
        with suppress(SystemExit):  # rich has redirected stdout to /dev/null by then
            super().on_broken_pipe()


def _write(console: RichConsole, text: str) -> None:
    """Print a line; when that fails (a full disk behind `>`), this and all that follow are dropped."""
    try:
        console.print(text)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


class Console:
    """Speaks on rank 0 and is silent elsewhere. A line that cannot be written never ends the program."""

    def __init__(self, rank: int = 0) -> None:
        accept_any_text()
        self._speaks = rank == 0
        self._console = _Terminal(highlight=False, soft_wrap=True, markup=False, emoji=False)

    def say(self, text: str) -> None:
        """Print a line (or several); above the bar, if one is shown."""
        if self._speaks:
            _write(self._console, text)

    def complain(self, text: str) -> None:
        """Print a line on stderr, from any rank: what went wrong here may be known nowhere else."""
        with suppress(OSError):
            sys.stderr.write(text + "\n" if self._speaks else f"(another rank) {text}\n")
            sys.stderr.flush()

    def bar(self, description: str, total: int, start: int = 0, *, brief: bool = False) -> "Bar":
        """Progress over `total` steps; a context manager. brief: in a pipe, print nothing if the work is quick."""
        return Bar(self._console if self._speaks else None, description, total, start, brief)

    @contextmanager
    def progress(self, description: str) -> Iterator[Callable[[int, int], None]]:
        """Yield report(done, total). The bar appears with its first call: work that is skipped shows none."""
        with ExitStack() as stack:
            bars: list[Bar] = []

            def report(done: int, total: int) -> None:
                if not bars:
                    bars.append(stack.enter_context(self.bar(description, total, brief=True)))
                bars[0].at(done)

            yield report


class Bar:
    """The progress of one piece of work."""

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
        """Show that `done` steps are done; `note` is shown beside the bar, for example the loss."""
        if self._progress is not None:
            self._progress.update(self._task, completed=done, note=note)
        elif self._console is not None:
            now = time.monotonic()
            if (done == self._total and self._says_the_end) or now - self._said >= _PLAIN_EVERY_S:
                self._said, self._says_the_end = now, True
                _write(self._console, f"{self._description} {done}/{self._total} {note}".rstrip())
