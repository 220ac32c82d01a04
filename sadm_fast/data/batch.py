"""Micro-batches: what a loader is told, what it yields, what it can do, and memory for its images."""

import math
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol, Self

import numpy as np
import torch
from torch import Tensor


class ImageBatch(NamedTuple):
    """One micro-batch of B samples; the tensors are the caller's own (no loader writes to them again)."""

    images: Tensor  # float32 [B, C, H, W]: images in [-1, 1], scaled latents (sadm_fast.scales), or [B, C, ...]
    labels: Tensor  # int64 [B], index into the source's classes
    sample_ids: Tensor  # int64 [B], global sample counters n


@dataclass(frozen=True)
class LoaderSpec:
    """How samples are read, in whatever order: config.data without its path. A loader ignores what it has no use for.

    resolution, channels: side of the square crop in pixels; 1 grey or 3 colour. enlarge: enlarge images smaller than
    the crop; otherwise they count as broken. loader: "dali", or "torch" (Pillow in worker processes; pixel-exact).
    decode: "mixed" (JPEG on the GPU, DALI only), "cpu", or "auto": mixed where there is a GPU. threads: reading threads
    or worker processes. prefetch: micro-batches to work ahead. Raises ValueError for arguments out of range.
    """

    resolution: int
    channels: int
    enlarge: bool = False
    loader: str = "dali"
    decode: str = "auto"
    threads: int = 2
    prefetch: int = 2

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise ValueError(f"channels={self.channels}: must be 1 or 3")
        if self.threads < 1 or self.prefetch < 1:
            raise ValueError(f"threads={self.threads}, prefetch={self.prefetch}: must be at least 1")
        if self.loader not in ("dali", "torch"):
            raise ValueError(f"loader={self.loader!r}: must be 'dali' or 'torch'")
        if self.decode not in ("auto", "mixed", "cpu"):
            raise ValueError(f"decode={self.decode!r}: must be 'auto', 'mixed' or 'cpu'")


class Loader(Protocol):
    """An endless iterator of ImageBatch with threads or processes of its own; close() ends them.

    It yields plan[0], plan[1], ... of its MicroBatchPlan. A sample is a function of the source, the plan's seed and the
    sample's counter, index and mirror flag alone: the same on any rank, at any micro-batch, with any threads and
    prefetch. So a run resumes at any sample without a saved state of its loader.
    """

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
