"""One iteration of each mode, a group for each setup: `pytest benchmarks/test_game_cost.py --benchmark-only`.

A quick look: iterations of one mode run one after the other here, so the ratios that count are those of game_cost.py,
where they take turns.
"""

from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks import measure
from benchmarks.game_cost import WARMUP, WAYS, Case
from benchmarks.latent_game import iteration
from sadm_fast.ranks.launch import Place, distributed

THREADS = 2
CASES = [Case("fp32", 0, "imagenet", False, 32), Case("bf16", 2, "imagenet", False, 32)]


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with distributed() as found:
        yield found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_iteration(benchmark: Any, place: Place, case: Case, way: str) -> None:
    measure.use_threads(THREADS)
    call = iteration(case.config(way), place.device)
    for _ in range(WARMUP):
        call()
    benchmark.group = str(case)
    benchmark.extra_info |= {"device": place.device.type, "threads": THREADS}
    benchmark.pedantic(call, rounds=5, iterations=1)
