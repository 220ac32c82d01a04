"""What every rank must know of the others, asked once an iteration in one small all-reduce."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from sadm_fast.ranks.collectives import communication_device, is_distributed, max_over_ranks


class Answers(NamedTuple):
    """Whether it is so on any rank."""

    stop: bool  # asked to stop
    writing: bool  # still writing its part of a checkpoint
    write_failed: bool  # has failed to write it


class Vote:
    """An iteration's one all-reduce: ORs three flags over ranks: stop requested, save running, save failed.

    Whether a loss or gradient is finite is not asked here: the engines agree on that themselves (Players.iteration).

    Args:
        stop: whether this rank has been asked to stop.
        saving: (writing, write_failed) of this rank.
    """

    def __init__(
        self,
        stop: Callable[[], bool] = lambda: False,
        saving: Callable[[], tuple[bool, bool]] = lambda: (False, False),
    ) -> None:
        self._stop, self._saving = stop, saving

    def ask(self) -> Answers:
        """The answers of all ranks. Collective."""
        mine = (self._stop(), *self._saving())
        if not is_distributed():
            return Answers(*mine)
        flags = torch.tensor(mine, dtype=torch.int32, device=communication_device())
        return Answers(*map(bool, max_over_ranks(flags).tolist()))
