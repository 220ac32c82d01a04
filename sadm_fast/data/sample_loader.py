"""Micro-batches of samples that need no decoding, read ahead by threads."""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from sadm_fast.data.batch import ImageBatch, LoaderSpec
from sadm_fast.data.order import MicroBatch, MicroBatchPlan
from sadm_fast.data.samples import SampleSource


class SampleLoader:
    """An endless iterator of ImageBatch on `device`, images being samples float32 [B, *source.shape].

    spec.threads read spec.prefetch micro-batches ahead. Call close() (or leave the `with` block) to end the threads.
    """

    def __init__(self, source: SampleSource, plan: MicroBatchPlan, spec: LoaderSpec, device: torch.device) -> None:
        self._source, self._plan, self._device, self._prefetch = source, plan, device, spec.prefetch
        self._pool: ThreadPoolExecutor | None = ThreadPoolExecutor(spec.threads, "samples")
        self._under_way: deque[tuple[MicroBatch, Future[np.ndarray]]] = deque()
        self._next = 0  # position in the plan that is read next
        self.broken: dict[str, str] = {}  # as the other loaders; there is nothing to decode

    def __iter__(self) -> "SampleLoader":
        return self

    def __next__(self) -> ImageBatch:
        if self._pool is None:
            raise StopIteration
        while len(self._under_way) <= self._prefetch:
            wanted = self._plan[self._next]
            self._under_way.append((wanted, self._pool.submit(self._source.read, wanted.indices, wanted.mirror)))
            self._next += 1
        wanted, task = self._under_way.popleft()
        return ImageBatch(
            torch.from_numpy(task.result()).to(self._device),
            torch.from_numpy(self._source.labels[wanted.indices]).to(self._device),
            torch.from_numpy(wanted.sample_ids).to(self._device),
        )

    def close(self) -> None:
        """End the threads; batches already yielded stay valid. Twice is fine."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
            self._under_way.clear()

    def __enter__(self) -> "SampleLoader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
