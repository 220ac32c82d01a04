"""What `encode.py --bench` measures: the loaders of a source, one after another, with nothing else going on."""

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from sadm_fast.data import make_loader
from sadm_fast.data.latent_loader import LatentLoader
from sadm_fast.data.latents import LatentSource
from sadm_fast.data.order import MicroBatchPlan
from sadm_fast.data.source import ImageSource
from sadm_fast.data.throughput import Closable, measure

_WARMUP, _BATCHES, _LATENT_BATCHES = 4, 12, 100


def bench_table(
    source: ImageSource | LatentSource, *, resolution: int, micro_batch: int, threads: int, rounds: int
) -> Iterator[str]:
    """Lines of a table: images a second of each loader, median and range of `rounds` interleaved rounds.

    Images: crops of `resolution` pixels by DALI and by torch workers. Latents: rows copied from the mapped shards,
    the same with the posterior drawn (what training gets), and for comparison plain copies of mapped memory.
    """
    factories: dict[str, Callable[[], Closable]]
    if isinstance(source, LatentSource):
        plan = MicroBatchPlan(num_images=len(source), seed=0, flip=True, micro_batch=micro_batch)
        factories = {
            "latents": partial(LatentLoader, source, plan, threads=threads),
            "latents, without the draw": partial(_Rows, source, plan),
            "memory copy of as many bytes": partial(_Copies, source, micro_batch),
        }
        what = f"{source.encoding.latent_shape} {source.encoding.dtype}"
        batches = _LATENT_BATCHES
    else:
        common: dict[str, Any] = {"resolution": resolution, "channels": 3, "enlarge": True, "flip": True, "seed": 0}
        factories = {
            name: partial(make_loader, source, loader=name, micro_batch=micro_batch, threads=threads, **common)
            for name in (["dali"] if importlib.util.find_spec("nvidia.dali") else []) + ["torch"]
        }
        what = f"{resolution}x{resolution} pixels"
        batches = _BATCHES
    yield f"{source.where}: {len(source)} samples, {what}, micro-batch {micro_batch}, {threads} threads"
    yield f"torch {torch.__version__}, {torch.get_num_threads()} torch threads; images a second, median (range)"
    for found in measure(factories, micro_batch=micro_batch, warmup=_WARMUP, batches=batches, rounds=rounds):
        slowest, fastest = found.spread
        yield f"  {found.name:<30} {found.median:>12,.0f}   ({slowest:,.0f} to {fastest:,.0f})"


class _Rows:
    """Only what is read from the cache, by one thread."""

    def __init__(self, source: LatentSource, plan: MicroBatchPlan) -> None:
        self._source = source
        self._wanted = iter([plan[position] for position in range(_WARMUP + _LATENT_BATCHES)])
        self._out = source.buffer(plan.micro_batch)

    def __next__(self) -> np.ndarray:
        wanted = next(self._wanted)
        self._source.read(wanted.indices, wanted.mirror, self._out)
        return self._out

    def close(self) -> None:
        pass


class _Copies:
    """Consecutive rows in one copy: the speed of memory, by one thread."""

    def __init__(self, source: LatentSource, micro_batch: int) -> None:
        self._rows = source.longest_map()
        self._out = source.buffer(min(micro_batch, len(self._rows)))
        self._copies = -(-micro_batch // len(self._out))  # of a cache smaller than a micro-batch
        self._first = 0

    def __next__(self) -> np.ndarray:
        for _ in range(self._copies):
            np.copyto(self._out, self._rows[self._first : self._first + len(self._out)])
            self._first = (self._first + len(self._out)) % (len(self._rows) - len(self._out) + 1)
        return self._out

    def close(self) -> None:
        pass
