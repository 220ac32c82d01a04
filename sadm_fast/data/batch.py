"""Micro-batches: what a loader yields, the protocol of a loader, and memory for its images."""

import math
import weakref
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple, Protocol, Self

import numpy as np
import torch
from torch import Tensor


class ImageBatch(NamedTuple):
    """One micro-batch of B samples; the tensors are the caller's own (no loader writes to them again)."""

    images: Tensor  # float32 [B, C, H, W] in [-1, 1]
    labels: Tensor  # int64 [B], index into ImageFolder.classes
    sample_ids: Tensor  # int64 [B], global sample counters n


class Loader(Protocol):
    """An endless iterator of ImageBatch with threads or processes of its own; close() ends them."""

    @property
    def broken(self) -> dict[str, str]:
        """What could not be read so far and was replaced: name -> reason."""
        ...

    def __iter__(self) -> Iterator[ImageBatch]: ...

    def __next__(self) -> ImageBatch: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def close(self) -> None: ...


class ImageMemory:
    """Memory for float images that is used again once nobody holds the tensor that it was given out as.

    The system clears fresh memory page by page, which takes longer than filling it with a batch.
    """

    _KEPT = 4  # blocks; a caller that piles up batches does not leave all that memory here

    def __init__(self) -> None:
        self._free: deque[np.ndarray] = deque(maxlen=self._KEPT)

    def take(self, *shape: int) -> Tensor:
        """A float32 tensor of any contents, of memory that nothing else refers to."""
        size = math.prod(shape)
        block = self._free.pop() if self._free else None
        if block is None or block.size != size:
            block = np.empty(size, dtype=np.float32)
        given = block.reshape(shape)
        # The tensor and all its views share a storage, which holds `given` and lets go of it with the last of them.
        weakref.finalize(given, self._free.append, block).atexit = False
        return torch.from_numpy(given)


def stack_crops(crops: list[np.ndarray]) -> Tensor:
    """Crops uint8 [S, S, C] of one size (what adm_crop returns) to one uint8 tensor [B, C, S, S]."""
    return torch.from_numpy(np.stack(crops).transpose(0, 3, 1, 2).copy())
