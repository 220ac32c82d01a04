"""How many images a second loaders deliver, when nothing else is done with them."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol


class Closable(Protocol):
    """An endless iterator of micro-batches with threads or processes that close() ends."""

    def __next__(self) -> Any: ...

    def close(self) -> None: ...


class Throughput(NamedTuple):
    """What was measured of one loader, in images a second."""

    name: str
    median: float
    spread: tuple[float, float]  # the slowest and the fastest round
    rounds: tuple[float, ...]  # every round, in their order


def measure(
    factories: Mapping[str, Callable[[], Closable]], *, micro_batch: int, warmup: int, batches: int, rounds: int
) -> list[Throughput]:
    """Each loader's throughput over `batches` micro-batches after `warmup` of them, in `rounds` rounds.

    A round makes, runs and closes every loader in turn, each round beginning with another: what disturbs the
    machine for a while falls on all alike, and ratios within a round hold. What a loader has prefetched when the
    clock starts is the less, the larger `batches` is against its queue.
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
