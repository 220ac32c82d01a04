"""What every rank must know of the others, asked once an iteration in one small all-reduce."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor


class NotFinite(Exception):
    """A loss or a gradient of some rank is NaN or infinite: raised on every rank, both players as before."""


class Vote:
    """Is a loss bad, has anybody been asked to stop, is anybody still writing a checkpoint, has somebody failed to?

    Args:
        stop: whether this rank has been asked to stop.
        saving: this rank's answers to the last two.
    """

    def __init__(
        self,
        stop: Callable[[], bool] = lambda: False,
        saving: Callable[[], tuple[bool, bool]] = lambda: (False, False),
    ) -> None:
        self._asked, self._saving = stop, saving
        self.stop = False
        self.writing, self.write_failed = False, False

    def agree_finite(self, loss: Tensor) -> None:
        """Raise NotFinite on every rank if `loss` is not finite on any; the other questions go along. Collective."""
        asked = torch.tensor([self._asked(), *self._saving()], device=loss.device)
        flags = torch.cat([~torch.isfinite(loss.detach()).all().view(1), asked]).to(torch.int32)
        if dist.get_world_size() > 1:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        bad, stop, writing, failed = flags.tolist()
        self.stop = self.stop or bool(stop)
        self.writing, self.write_failed = bool(writing), bool(failed)
        if bad:
            raise NotFinite
