"""The optimizer's one pass and torch's operations for it: `pytest benchmarks/test_optimizer_step.py --benchmark-only`.

A quick look; the ratios that count are those of optimizer_step.py, where the ways take turns.
"""

from typing import Any

import pytest
import torch

from benchmarks import measure
from benchmarks.optimizer_step import DTYPES, Step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [1 << 20] if DEVICE == "cpu" else [1 << 24, 675_000_000]  # DiT-XL/2 has the latter
THREADS = 2


@pytest.mark.parametrize("way", ["one pass", "torch", "torch, no clip"])
@pytest.mark.parametrize("gradient", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_step(benchmark: Any, n: int, gradient: str, way: str) -> None:
    measure.use_threads(THREADS)
    call = Step(n, DTYPES[gradient], DEVICE).ways[way]
    call()

    def finished() -> None:
        call()
        if DEVICE != "cpu":
            torch.cuda.synchronize()

    benchmark.group = f"{n} elements, gradient {gradient}, on {DEVICE}"
    benchmark.extra_info |= {"device": DEVICE, "threads": THREADS, "torch": torch.__version__}
    benchmark.pedantic(finished, rounds=11, iterations=3)
