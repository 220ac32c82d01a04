"""Micro-batches of cached latents. Threads copy rows ahead; the posterior is drawn when a batch is asked for.

The orientation that is read and the noise of the draw are functions of the global sample counter. So every epoch sees
new samples of the posterior, and a resumed run the same ones as an uninterrupted run. Latents that are draws themselves
(sadm_fast.data.lightning_latents) are taken as they are.
"""

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from sadm_fast.counters import Purpose, normal
from sadm_fast.data.batch import ImageBatch, ImageMemory, LoaderSpec
from sadm_fast.data.latents import LatentSource
from sadm_fast.data.order import MicroBatch, MicroBatchPlan
from sadm_fast.data.read_ahead import ReadAheadLoader

_ROWS_A_TASK = 64  # smaller tasks cost more than they spread
_CACHED = 2**17  # numbers drawn at once on a CPU, so that they stay in its caches until they are scaled

_Reading = tuple[MicroBatch, np.ndarray, list[Future[None]]]


class LatentLoader(ReadAheadLoader[_Reading]):
    """A ReadAheadLoader of scaled latents float32 [B, c, h, w] on `device`.

    spec.threads and spec.prefetch: as many reads as a slow file system needs under way. Reading a cache that vanishes
    under it ends the process with SIGBUS, as with any mapped file.
    """

    def __init__(
        self,
        source: LatentSource,
        plan: MicroBatchPlan,
        spec: LoaderSpec,
        device: torch.device,
    ) -> None:
        super().__init__(plan, spec, "latents")
        self._source, self._device = source, device
        self._used: list[np.ndarray] = []  # room for moments that is free again
        self._memory = ImageMemory()

    def _finish(self, reading: _Reading) -> ImageBatch:
        wanted, moments, tasks = reading
        for task in tasks:
            task.result()
        sample_ids = torch.from_numpy(wanted.sample_ids).to(self._device)
        if self._device.type == "cpu":
            latents = self._memory.take(len(moments), *moments.shape[2:])
            at_once = max(1, _CACHED // moments[0, 0].size)
        else:
            latents = torch.empty((len(moments), *moments.shape[2:]), device=self._device)
            at_once = len(moments)
        for first in range(0, len(moments), at_once):
            part = slice(first, first + at_once)
            raw, *std = torch.from_numpy(moments[part]).to(self._device, torch.float32).unbind(1)
            if std:
                noise = normal(self._plan.seed, Purpose.LATENT, sample_ids[part], raw.shape[1:])
                raw = noise.mul_(std[0]).add_(raw)
            latents[part] = self._source.scale.to_scaled(raw)
        self._used.append(moments)
        return ImageBatch(
            latents, torch.from_numpy(self._source.labels[wanted.indices]).to(self._device), sample_ids
        )  # fmt: skip

    def _start(self, wanted: MicroBatch, pool: ThreadPoolExecutor) -> _Reading:
        moments = self._used.pop() if self._used else self._source.buffer(len(wanted.indices))
        parts = [slice(first, first + _ROWS_A_TASK) for first in range(0, len(moments), _ROWS_A_TASK)]
        tasks = [
            pool.submit(self._source.read, wanted.indices[part], wanted.mirror[part], moments[part]) for part in parts
        ]
        return wanted, moments, tasks
