"""What the ranks of a process group tell one another: that they agree, and their rows.

Rows travel asynchronously. `share` starts sending real features before the generated ones exist; whatever else is
needed is sent together, and nothing is waited for before all of it is on its way.
"""

import json
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sadm_kernels.samples import Samples, compute_dtype

_TEXT = 1024  # bytes of what a rank says of its call


def agreed_weight(batch: Samples, queued: int, group: dist.ProcessGroup, options: dict[str, Any]) -> Tensor | None:
    """Check that all ranks agree. Returns `batch.weight`, or ones if only other ranks passed weights. Collective.

    A collective of unequal parts would hang or give nonsense. What has been agreed on before is not remembered: a rank
    that has something new to ask would ask alone.

    Args:
        queued: rows of the queue.
        options: what else must be the same, by name.

    Raises:
        ValueError: the ranks disagree, or no rank has a positive weight; on every rank.
    """
    weight = batch.weight
    mine = {
        "real.shape": str(tuple(batch.real.shape)),
        "fake.shape": str(tuple(batch.fake.shape)),
        "real.dtype": str(batch.real.dtype),
        "fake.dtype": str(batch.fake.dtype),
        "rows of queue": queued,
        "labels given": batch.labels is not None,
        **options,
    }
    about_weight = {
        "given": weight is not None,
        "positive": weight is None or bool((weight != 0).any()) or not len(weight),
    }
    ranks = _texts_of_all_ranks(json.dumps([mine, about_weight]), batch.real.device, group)
    said, weights = zip(*map(json.loads, ranks), strict=True)
    for name in mine:
        values = [rank[name] for rank in said]
        if len(set(values)) > 1:
            raise ValueError(f"{name} on the ranks of group: {', '.join(map(str, values))}; must be the same on all")
    if not any(rank["positive"] for rank in weights):
        raise ValueError("weight: all are zero on every rank of group, at least one must be positive")
    if weight is None and any(rank["given"] for rank in weights):
        return batch.real.new_ones(len(batch.real), dtype=compute_dtype(batch.real, batch.fake))
    return weight


def _texts_of_all_ranks(text: str, device: torch.device, group: dist.ProcessGroup) -> list[str]:
    """The text of every rank, in rank order. Collective."""
    own = torch.frombuffer(bytearray(text.encode().ljust(_TEXT)), dtype=torch.uint8).to(device)
    if len(own) != _TEXT:
        raise ValueError(f"group: {len(own)} bytes to agree on, must be at most {_TEXT}")
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own, group=group)
    return [bytes(part.tolist()).decode() for part in parts]


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
    weight: Tensor | None  # float64 [b]
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

    weight = None if weight is None else weight.double()
    labels = None if labels is None else labels.long()
    return Shared(real, weight, labels, queue, group, start(real), start(weight), start(labels))
