"""The order of samples: which image a global sample counter means, which counters a rank's micro-batch holds.

A run counts its samples n = 0, 1, 2, ... over all ranks. With N images, n is at position n % N of epoch n // N, and its
image is permutation(seed, epoch)[position]. No worker or loader has a say, so a run resumes at any n, on any number of
ranks.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from sadm_fast.counters import Purpose, permutation, uniform


class SampleOrder:
    """Maps global sample counters to images: every image once an epoch, shuffled anew for each."""

    def __init__(self, num_images: int, seed: int) -> None:
        if num_images < 1:
            raise ValueError(f"num_images={num_images}: must be at least 1")
        self.num_images = num_images
        self.seed = seed
        self._permutations: dict[int, np.ndarray] = {}

    def images(self, sample_ids: np.ndarray) -> np.ndarray:
        """The image index of each counter: int64 [m] for int64 [m]; a batch may span epochs."""
        sample_ids = np.asarray(sample_ids, dtype=np.int64)
        epochs, positions = np.divmod(sample_ids, self.num_images)
        used = {int(epoch): self._permutation(int(epoch)) for epoch in np.unique(epochs)}
        self._permutations = used  # a run only moves forward: what this call did not use is not used again
        indices = np.empty_like(sample_ids)
        for epoch, order in used.items():
            chosen = epochs == epoch
            indices[chosen] = order[positions[chosen]]
        return indices

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch in self._permutations:
            return self._permutations[epoch]
        return permutation(self.seed, epoch, self.num_images).numpy()


class SampleFlips:
    """Says which global sample counters are mirrored: half of them, as a function of (seed, counter)."""

    _BLOCK = 4096  # drawn at once: for one micro-batch the generator's fixed cost would be that of decoding it

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._blocks: dict[int, np.ndarray] = {}

    def of(self, sample_ids: np.ndarray) -> np.ndarray:
        """The flags of ascending counters int64 [m]: bool [m]."""
        first, last = int(sample_ids[0]) // self._BLOCK, int(sample_ids[-1]) // self._BLOCK
        self._blocks = {block: self._block(block) for block in range(first, last + 1)}
        return np.concatenate(list(self._blocks.values()))[sample_ids - first * self._BLOCK]

    def _block(self, block: int) -> np.ndarray:
        if block in self._blocks:
            return self._blocks[block]
        sample_ids = torch.arange(block * self._BLOCK, (block + 1) * self._BLOCK)
        return (uniform(self.seed, Purpose.FLIP, sample_ids)[:, 0] < 0.5).numpy()


def micro_batch_ids(
    iteration: int,
    micro_step: int,
    rank: int,
    *,
    micro_batch: int,
    grad_accumulation: int,
    world_size: int,
    first_sample: int = 0,
) -> np.ndarray:
    """The global sample counters of one rank's micro-batch: int64 [micro_batch].

    Iteration i since first_sample, micro step k, rank r of W, micro-batch m, accumulation A:
    n = first_sample + ((i*A + k)*W + r)*m + (0..m-1).
    """
    first = first_sample + ((iteration * grad_accumulation + micro_step) * world_size + rank) * micro_batch
    return np.arange(first, first + micro_batch, dtype=np.int64)


class MicroBatch(NamedTuple):
    """What to read for one micro-batch of m samples; each array is [m]."""

    sample_ids: np.ndarray  # int64, global sample counters
    indices: np.ndarray  # int64, image of each counter
    mirror: np.ndarray  # bool, whether to flip left to right


@dataclass(frozen=True)
class MicroBatchPlan:
    """One rank's endless sequence of micro-batches from global sample first_sample on: plan[0], plan[1], ...

    first_sample: where an earlier run stopped, in samples of all its ranks together. The new run may have another world
    size, micro-batch and accumulation; only samples are counted alike in both.
    """

    num_images: int
    seed: int
    flip: bool
    micro_batch: int
    grad_accumulation: int = 1
    rank: int = 0
    world_size: int = 1
    first_sample: int = 0
    _order: SampleOrder = field(init=False, repr=False, compare=False)
    _flips: SampleFlips = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("micro_batch", "grad_accumulation", "world_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank={self.rank}: must be from 0 to world_size-1={self.world_size - 1}")
        if self.first_sample < 0:
            raise ValueError(f"first_sample={self.first_sample}: must not be negative")
        object.__setattr__(self, "_order", SampleOrder(self.num_images, self.seed))
        object.__setattr__(self, "_flips", SampleFlips(self.seed))

    def __getitem__(self, position: int) -> MicroBatch:
        """Micro-batch number `position` counted from first_sample: micro step k of iteration i is i*A + k."""
        iteration, micro_step = divmod(position, self.grad_accumulation)
        sample_ids = micro_batch_ids(
            iteration,
            micro_step,
            self.rank,
            micro_batch=self.micro_batch,
            grad_accumulation=self.grad_accumulation,
            world_size=self.world_size,
            first_sample=self.first_sample,
        )
        mirror = self._flips.of(sample_ids) if self.flip else np.zeros(self.micro_batch, dtype=bool)
        return MicroBatch(sample_ids, self._order.images(sample_ids), mirror)
