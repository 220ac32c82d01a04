"""Micro-batches of samples that need no decoding."""

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from sadm_fast.data.batch import ImageBatch, LoaderSpec
from sadm_fast.data.order import MicroBatch, MicroBatchPlan
from sadm_fast.data.read_ahead import ReadAheadLoader
from sadm_fast.data.samples import SampleSource

_Reading = tuple[MicroBatch, Future[np.ndarray]]


class SampleLoader(ReadAheadLoader[_Reading]):
    """A ReadAheadLoader of samples float32 [B, *source.shape] on `device`."""

    def __init__(self, source: SampleSource, plan: MicroBatchPlan, spec: LoaderSpec, device: torch.device) -> None:
        super().__init__(plan, spec, "samples")
        self._source, self._device = source, device

    def _start(self, wanted: MicroBatch, pool: ThreadPoolExecutor) -> _Reading:
        return wanted, pool.submit(self._source.read, wanted.indices, wanted.mirror)

    def _finish(self, reading: _Reading) -> ImageBatch:
        wanted, task = reading
        return ImageBatch(
            torch.from_numpy(task.result()).to(self._device),
            torch.from_numpy(self._source.labels[wanted.indices]).to(self._device),
            torch.from_numpy(wanted.sample_ids).to(self._device),
        )
