"""Exceptions that mean: one line for the person at the terminal, no traceback."""

import os
import sys


class UserError(Exception):
    """A one-line message that names the thing, its value and the remedy; entry points print it and exit with 2.

    said: whether another rank has already printed the same line; None where that is not known (sadm_fast.launch).
    """

    said: bool | None = None


class LostRank(Exception):
    """A collective failed because another rank is gone; entry points print it and exit with 1."""


def speaks_for_machine() -> bool:
    """Whether this rank is the one that says what all ranks of a machine meet alike."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def print_error(error: UserError) -> None:
    """The line, on stderr, from one of the ranks that met the error."""
    if speaks_for_machine() if error.said is None else not error.said:
        print(f"error: {error}", file=sys.stderr)
