"""What loaders without decoding have in common: threads read the micro-batches of a plan ahead."""

from abc import ABC, abstractmethod
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, Self, TypeVar

from sadm_fast.data.batch import ImageBatch, LoaderSpec
from sadm_fast.data.order import MicroBatch, MicroBatchPlan

Reading = TypeVar("Reading")  # a micro-batch that is being read


class ReadAheadLoader(ABC, Generic[Reading]):
    """An endless iterator of ImageBatch. spec.threads read spec.prefetch micro-batches ahead.

    Call close() (or leave the `with` block) to end the threads.
    """

    def __init__(self, plan: MicroBatchPlan, spec: LoaderSpec, threads: str) -> None:
        """threads: their name."""
        self._plan, self._prefetch = plan, spec.prefetch
        self._pool: ThreadPoolExecutor | None = ThreadPoolExecutor(spec.threads, threads)
        self._under_way: deque[Reading] = deque()
        self._next = 0  # position in the plan that is read next
        self.broken: dict[str, str] = {}  # as the other loaders; there is nothing to decode

    @abstractmethod
    def _start(self, wanted: MicroBatch, pool: ThreadPoolExecutor) -> Reading:
        """Give the pool what is to be read."""

    @abstractmethod
    def _finish(self, reading: Reading) -> ImageBatch:
        """Wait for it, and make a batch of it."""

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> ImageBatch:
        if self._pool is None:
            raise StopIteration
        while len(self._under_way) <= self._prefetch:
            self._under_way.append(self._start(self._plan[self._next], self._pool))
            self._next += 1
        return self._finish(self._under_way.popleft())

    def close(self) -> None:
        """End the threads; batches already yielded stay valid. Twice is fine."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
            self._under_way.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
