"""Forward and backward of the structure loss, a group for each problem: `pytest benchmarks/ --benchmark-only`.

A quick look in about three minutes. Providers run one after the other here, so the ratios that count are those of
structure_loss.py, where they take turns. STRUCTURE_LOSS_SIZES and STRUCTURE_LOSS_DIMS choose other problems:

    STRUCTURE_LOSS_SIZES="4096 8192" STRUCTURE_LOSS_DIMS="128 512" pytest benchmarks/ --benchmark-only
"""

import os
from typing import Any

import pytest
import torch

from benchmarks import measure
from benchmarks.peers import FLOOR, PEERS, Case, GemmFloor, Unavailable, loss_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OURS = "native" if DEVICE == "cpu" else "triton"
THREADS = 2


def chosen(name: str, default: str) -> list[int]:
    return [int(value) for value in os.environ.get(name, default).split()]


@pytest.mark.parametrize("provider", [OURS, *PEERS, FLOOR])
@pytest.mark.parametrize("grads", ["fake", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("dim", chosen("STRUCTURE_LOSS_DIMS", "512"))
@pytest.mark.parametrize("size", chosen("STRUCTURE_LOSS_SIZES", "64 256 1024"))
def test_forward_and_backward(
    benchmark: Any, size: int, dim: int, dtype: torch.dtype, grads: str, provider: str
) -> None:
    case = Case(size, dim, dtype, grads, device=DEVICE)
    measure.use_threads(THREADS)
    call: measure.Call
    try:
        call = (
            GemmFloor(case, *case.features())
            if provider == FLOOR
            else measure.forward_backward(loss_of(provider, case), case)
        )
    except Unavailable as reason:
        pytest.skip(str(reason))

    def finished() -> None:
        call()
        if DEVICE != "cpu":
            torch.cuda.synchronize()

    duration = min(measure.seconds(call, 1, DEVICE) for _ in range(3))
    benchmark.group = f"{case} on {DEVICE}"
    benchmark.extra_info |= {"device": DEVICE, "threads": THREADS, "torch": torch.__version__}
    benchmark.pedantic(finished, rounds=11, iterations=measure.iterations(duration))
