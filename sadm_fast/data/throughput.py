"""Measure the images a second that loaders deliver with nothing else going on: the table of `encode.py --bench`."""

import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from sadm_fast.data import LoaderSpec, MicroBatchPlan, make_loader
from sadm_fast.data.latents import LatentSource
from sadm_fast.data.source import ImageSource

_WARMUP, _BATCHES, _LATENT_BATCHES = 4, 12, 100


class Closable(Protocol):
    """An endless iterator of micro-batches with threads or processes that close() ends."""

    def __next__(self) -> Any: ...

    def close(self) -> None: ...


class Throughput(NamedTuple):
    """Images a second of one loader."""

    name: str
    median: float
    spread: tuple[float, float]  # the slowest and the fastest round
    rounds: tuple[float, ...]  # every round, in their order


def measure(
    factories: Mapping[str, Callable[[], Closable]], *, micro_batch: int, warmup: int, batches: int, rounds: int
) -> list[Throughput]:
    """Measure each loader over `batches` micro-batches after `warmup` of them, in `rounds` interleaved rounds.

    A round makes, runs and closes every loader in turn; each round begins with another one. So a disturbance of the
    machine falls on all alike, and ratios within a round hold. Take `batches` well above the length of a loader's
    queue: what it has prefetched when the clock starts is counted as well.
    """
    if min(micro_batch, batches, rounds) < 1 or warmup < 0:
        raise ValueError(f"{micro_batch=}, {batches=}, {rounds=}, {warmup=}: must be at least 1 (warmup: 0)")
    names = list(factories)
    rates: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names) if names else 0
        for name in names[first:] + names[:first]:
            rates[name].append(micro_batch * batches / _seconds(factories[name], warmup, batches))
    return [
        Throughput(name, statistics.median(found), (min(found), max(found)), tuple(found))
        for name, found in rates.items()
    ]


def _seconds(factory: Callable[[], Closable], warmup: int, batches: int) -> float:
    loader = factory()
    try:
        for _ in range(warmup):
            next(loader)
        start = time.perf_counter()
        for _ in range(batches):
            next(loader)
        return time.perf_counter() - start
    finally:
        loader.close()


def bench_table(
    source: ImageSource | LatentSource, *, resolution: int, micro_batch: int, threads: int, rounds: int
) -> Iterator[str]:
    """Lines of a table: images a second of each loader, median and range of `rounds` interleaved rounds.

    Images: crops of `resolution` pixels by DALI and by torch workers. Latents: rows copied from the mapped shards,
    the same with the posterior drawn (what training gets), and for comparison plain copies of mapped memory.
    """
    factories: dict[str, Callable[[], Closable]]
    plan = MicroBatchPlan(num_images=len(source), seed=0, flip=True, micro_batch=micro_batch)
    spec = LoaderSpec(resolution, channels=3, enlarge=True, threads=threads)
    if isinstance(source, LatentSource):
        factories = {
            "latents": partial(make_loader, source, plan, spec),
            "latents, without the draw": partial(_Rows, source, plan),
            "memory copy of as many bytes": partial(_Copies, source, micro_batch),
        }
        what = f"{source.latent_shape} {source.dtype}"
        batches = _LATENT_BATCHES
    else:
        factories = {
            name: partial(make_loader, source, plan, replace(spec, loader=name))
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
