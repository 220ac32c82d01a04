"""Exceptions that mean: one line for the person at the terminal, no traceback."""

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

    said: whether another rank has already printed the same line; None where that is not known (sadm_fast.ranks.launch).
    """

    said: bool | None = None


class LostRank(Exception):
    """A collective failed because another rank is gone; entry points print it and exit with 1."""


def sign_of_a_lost_rank(error: Exception) -> str | None:
    """Return the words in a collective's error that say that another rank is gone; None if it is another error."""
    if not isinstance(error, RuntimeError):
        return None
    return next((sign for sign in _SIGNS_OF_A_LOST_RANK if sign in str(error)), None)
