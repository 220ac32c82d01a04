"""The columns that a rank's rows are compared with: the batch of all ranks, and behind it a queue of past samples.

What ranks send one another travels asynchronously. `share` starts that for real features before the generated ones are
there; whatever else is needed is sent together, and nothing is waited for before all of it is on its way.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype sums are kept in: float64 for float64 input, float32 for everything narrower."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class Queue(NamedTuple):
    """Features of q samples of earlier batches; they have no gradient any more.

    S then runs over all ordered pairs with at least one sample of the batch B: each of its two sums is
    sum_{i, j in B, i != j} + 2 sum_{i in B, k in Q}. Pairs inside the queue do not depend on the batch: left out.
    """

    real: Tensor  # [q, d], any float dtype: they are converted to the batch's
    fake: Tensor  # [q, d]
    weight: Tensor | None = None  # [q], non-negative; None: ones
    labels: Tensor | None = None  # integers [q]; there if and only if the batch has labels


class Columns(NamedTuple):
    """n columns, of which the last `queued` are a queue's."""

    real: Tensor  # [n, d]
    fake: Tensor  # [n, d]
    weight: Tensor | None  # [n], float32 (float64 for float64 features)
    labels: Tensor | None  # int64 [n]
    queued: int = 0


class Gathering:
    """Rows of all ranks below each other, on their way; every rank brings as many."""

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
    """One rank's rows, and those of all ranks on their way here; made by `share`."""

    real: Tensor  # [b, d]
    weight: Tensor | None  # [b], float32 (float64 for float64 features)
    labels: Tensor | None  # int64 [b]
    queue: Queue | None
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
    real: Tensor, weight: Tensor | None, labels: Tensor | None, queue: Queue | None, group: dist.ProcessGroup
) -> Shared:
    """Start what `share` promises, of arguments that have been checked. Collective."""

    def start(rows: Tensor | None) -> Any:
        return None if rows is None else Gathering(rows, group)

    weight = None if weight is None else weight.to(compute_dtype(real))
    labels = None if labels is None else labels.long()
    return Shared(real, weight, labels, queue, group, start(real), start(weight), start(labels))


def append(batch: Columns, queue: Queue) -> Columns:
    """The batch's columns, and behind them the queue's."""
    weight, labels = batch.weight, batch.labels
    if weight is not None or queue.weight is not None:
        dtype = compute_dtype(batch.real)
        now = batch.real.new_ones(len(batch.real), dtype=dtype) if weight is None else weight
        past = batch.real.new_ones(len(queue.real)) if queue.weight is None else queue.weight
        weight = torch.cat([now, past.to(dtype)])
    if labels is not None and queue.labels is not None:
        labels = torch.cat([labels, queue.labels.to(labels.dtype)])
    real = torch.cat([batch.real, queue.real.to(batch.real.dtype)])
    fake = torch.cat([batch.fake, queue.fake.to(batch.fake.dtype)])
    return Columns(real, fake, weight, labels, len(queue.real))
