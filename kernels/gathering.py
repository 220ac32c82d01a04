"""Rows of all ranks of a process group, sent asynchronously.

`share` starts sending real features before the generated ones exist; whatever else is needed is sent together, and
nothing is waited for before all of it is on its way.
"""

from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from sadm_kernels.samples import Samples, compute_dtype


class Gathering:
    """An asynchronous all-gather, equally many rows per rank; `wait` returns them in rank order."""

    def __init__(self, rows: Tensor, group: dist.ProcessGroup) -> None:
        self._sent = rows.detach().contiguous()
        self._columns = rows.new_empty((dist.get_world_size(group), *rows.shape))
        self._work: Any = dist.all_gather(list(self._columns.unbind()), self._sent, group=group, async_op=True)

    def wait(self) -> Tensor:
        """[ranks * b, ...], without a gradient; on a GPU the stream waits, not the caller."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._columns.flatten(0, 1)


class Shared(NamedTuple):
    """One rank's real features and those of all ranks on their way here; made by `share`."""

    real: Tensor  # [b, d]
    weight: Tensor | None  # [b], float32 (float64 for float64 features)
    labels: Tensor | None  # int64 [b]
    queue: Samples | None
    group: dist.ProcessGroup
    all_real: Gathering
    all_weight: Gathering | None
    all_labels: Gathering | None

    def wait(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Real features, weights and labels of all ranks."""
        weight = None if self.all_weight is None else self.all_weight.wait()
        labels = None if self.all_labels is None else self.all_labels.wait()
        return self.all_real.wait(), weight, labels


def send(
    real: Tensor, weight: Tensor | None, labels: Tensor | None, queue: Samples | None, group: dist.ProcessGroup
) -> Shared:
    """Start what `share` promises, of arguments that have been checked. Collective."""

    def start(rows: Tensor | None) -> Any:
        return None if rows is None else Gathering(rows, group)

    weight = None if weight is None else weight.to(compute_dtype(real))
    labels = None if labels is None else labels.long()
    return Shared(real, weight, labels, queue, group, start(real), start(weight), start(labels))
