"""What every rank must know of the others, asked once an iteration in one small all-reduce."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from sadm_fast.ranks.collectives import communication_device, is_distributed, sum_over_ranks
from sadm_fast.ranks.on_host import OnHost


class Answers(NamedTuple):
    """Whether it is so on any rank."""

    stop: bool  # asked to stop
    writing: bool  # still writing its part of a checkpoint
    write_failed: bool  # has failed to write it


_NOTHING_YET = Answers(stop=False, writing=True, write_failed=False)


class Vote:
    """An iteration's one all-reduce: ORs three flags over ranks: stop requested, save running, save failed.

    Nobody waits for it: between several ranks, an iteration hears what was asked in the one before. Whether a loss or
    gradient is finite is not asked here: the engines agree on that themselves (Players.launch).

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
        self._asked: OnHost | None = None  # the sum over ranks of the last question's flags

    def ask(self) -> Answers:
        """The answers of all ranks to the question before this one; `writing` if there is none. Collective."""
        mine = (self._stop(), *self._saving())
        if not is_distributed():
            return Answers(*mine)
        flags = sum_over_ranks(torch.tensor(mine, dtype=torch.int32, device=communication_device()))
        before, self._asked = self._asked, OnHost(flags)
        return _NOTHING_YET if before is None else Answers(*map(bool, before.wait().tolist()))

    def start_anew(self) -> None:
        """Forget what has been asked so far: a save has begun since."""
        self._asked = None
