"""S over the samples of all ranks (game.scope=global): how features travel, and what data parallelism makes of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor

from sadm_fast.game import Comparison
from sadm_kernels import Queue, share


@dataclass(frozen=True)
class SharedComparison(Comparison):
    """The S of the whole batch, of which each rank of `group` holds an equal part; its gradient in this rank's rows."""

    group: dist.ProcessGroup = field(kw_only=True)
    _agreed: set[Any] = field(default_factory=set, init=False, repr=False, compare=False)

    def of_real(
        self, f: Tensor, log_snr: Tensor, labels: Tensor, queue: Queue | None = None
    ) -> Callable[[Tensor], Tensor]:
        """As Comparison.of_real. f is on its way to the other ranks when this returns; g and the sums are waited for.

        Engines average gradients over ranks, but each rank's rows carry their whole gradient already: the gradient of
        what is returned is multiplied by the number of ranks, its value is not.
        """
        samples = self.samples(log_snr, labels, queue)
        if self.impl == "reference":
            distance_from = partial(self.loss, f, **samples, group=self.group)
        else:
            # All ranks run one configuration on micro-batches of one size: what they agreed on once holds.
            size = (f.shape, f.dtype)
            shared = share(f, **samples, group=self.group, check=size not in self._agreed)
            self._agreed.add(size)
            distance_from = partial(self.loss, shared)
        others = dist.get_world_size(self.group) - 1

        def distance(g: Tensor) -> Tensor:
            value = distance_from(g)
            return value + others * (value - value.detach())

        return distance
