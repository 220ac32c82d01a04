"""The feature queue (game.queue): Psi's features of the last samples, which a small batch is compared with as well.

It is one queue of the whole run: the samples of all ranks, by global sample number, the same on every rank whatever
game.scope is. So it is saved once, and a run goes on with it on another number of ranks or micro-batches. Its features
come from the Psi and the denoiser of their own iteration: they lag behind by up to capacity / samples_per_step steps.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from sadm_fast.config import Config
from sadm_fast.errors import UserError
from sadm_fast.ranks.collectives import rank_and_world_size
from sadm_kernels import Queue


class FeatureQueue:
    """A ring of the last `capacity` samples: features [capacity, width] float32, weights, labels.

    Args:
        width: of Psi's features.
    """

    def __init__(self, capacity: int, width: int, device: torch.device) -> None:
        self._ring = {
            "real": torch.zeros(capacity, width, device=device),
            "fake": torch.zeros(capacity, width, device=device),
            "weight": torch.zeros(capacity, device=device),
            "labels": torch.zeros(capacity, dtype=torch.int64, device=device),
        }
        self._capacity = capacity
        self._pushed = 0  # samples since the run began

    @property
    def columns(self) -> Queue | None:
        """Return views of the queue's samples, in the ring's order; None while it is empty."""
        filled = min(self._pushed, self._capacity)
        return Queue(**{name: values[:filled] for name, values in self._ring.items()}) if filled else None

    @torch.no_grad()
    def push(self, micro_batches: Sequence[Queue]) -> None:
        """Add what each of this rank's micro-batches of one iteration had, with weights and labels. Collective."""
        rows = _of_all_ranks(torch.stack([_packed(samples) for samples in micro_batches]))
        lost = max(0, len(rows) - self._capacity)  # of more samples than there is room for the last ones stay
        first, self._pushed = self._pushed + lost, self._pushed + len(rows)
        at = torch.arange(first, self._pushed, device=rows.device) % self._capacity
        width = self._ring["real"].shape[1]
        for name, values in zip(self._ring, rows[lost:].split([width, width, 1, 1], dim=1), strict=True):
            ring = self._ring[name]
            ring[at] = values.view(-1, *ring.shape[1:]).to(ring.dtype)

    def state(self) -> dict[str, Tensor]:
        """Return the tensors to save, by name: views of the ring, and the number of samples pushed."""
        return {**self._ring, "pushed": torch.tensor([self._pushed])}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state` returned, on any number of ranks.

        Raises:
            ValueError: it is that of a queue of another size.
        """
        for name, own in self.state().items():
            if state[name].shape != own.shape or state[name].dtype != own.dtype:
                raise ValueError(f"queue: {name} is {tuple(state[name].shape)}, must be {tuple(own.shape)}")
        for name, ring in self._ring.items():
            ring.copy_(state[name])
        self._pushed = int(state["pushed"])


def _packed(samples: Queue) -> Tensor:
    """Pack a micro-batch into one float32 tensor [B, 2 d + 2] to send. Labels below 2^24 stay exact."""
    assert samples.weight is not None and samples.labels is not None
    return torch.cat([x.float().view(len(samples.real), -1) for x in samples if x is not None], dim=1)


def _of_all_ranks(rows: Tensor) -> Tensor:
    """All-gather [micro-batches, B, n] to [samples, n] in the order of the global sample number. Collective."""
    ranks = rank_and_world_size()[1]
    if ranks == 1:
        return rows.flatten(0, 1)
    everybody = rows.new_empty((ranks, *rows.shape))
    dist.all_gather(list(everybody.unbind()), rows)
    return everybody.transpose(0, 1).flatten(0, 2)


def check_queue(config: Config, world_size: int) -> None:
    """Raise UserError if the queue is smaller than one step of all ranks."""
    samples = config.train.micro_batch * config.train.grad_accumulation * world_size
    if 0 < config.game.queue < samples:
        raise UserError(
            f"game.queue={config.game.queue}: must be 0, or at least the {samples} samples of a step on"
            f" {world_size} ranks"
        )
