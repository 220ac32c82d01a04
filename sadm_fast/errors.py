"""Exceptions that mean: one line for the person at the terminal, no traceback."""

import os
import sys

# How gloo, NCCL and the store say that the other end of a connection is no longer there.
_SIGNS_OF_A_LOST_RANK = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Application timeout caused pair closure",
    "Timed out waiting",
    "remote process exited",
    "failed to recv",
)


class UserError(Exception):
    """A one-line message that names the thing, its value and the remedy; entry points print it and exit with 2.

    said: whether another rank has already printed the same line; None where that is not known (sadm_fast.launch).
    """

    said: bool | None = None


class LostRank(Exception):
    """A collective failed because another rank is gone; entry points print it and exit with 1."""


def sign_of_a_lost_rank(error: Exception) -> str | None:
    """What in a collective's error says that another rank is gone; None if it is about something else."""
    if not isinstance(error, RuntimeError):
        return None
    return next((sign for sign in _SIGNS_OF_A_LOST_RANK if sign in str(error)), None)


def speaks_for_machine() -> bool:
    """Whether this rank is the one that says what all ranks of a machine meet alike."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def print_error(error: UserError) -> None:
    """The line, on stderr, from one of the ranks that met the error."""
    if speaks_for_machine() if error.said is None else not error.said:
        print(f"error: {error}", file=sys.stderr)
