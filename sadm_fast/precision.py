"""fp32, TF32 or bf16: what train.precision=auto takes, what is said of bf16 at the start, and GPUs' TF32.

Some processors have no instructions for bf16: PyTorch then converts every number, and bf16 takes several times as long
as fp32. One matrix product tells.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from sadm_fast.config import Config
from sadm_fast.ranks.collectives import broadcast_json

_SIDE = 512  # of the square matrices on a CPU: some milliseconds on one core
_GPU_SIDE = 4096
_ROUNDS = 5
_GAIN = 1.1  # bf16 must be quicker by this factor: it rounds, so a tie goes to fp32


def bf16_gain(device: torch.device) -> float:
    """Time of a matrix product in fp32 over its time in bf16: the best of some rounds, taken in turns."""
    side = _GPU_SIDE if device.type == "cuda" else _SIDE
    matrices = [torch.ones(side, side, device=device, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    best = [float("inf")] * len(matrices)
    for turn in range(1 + _ROUNDS):
        for i, matrix in enumerate(matrices):
            _wait(device)
            started = time.perf_counter()
            torch.mm(matrix, matrix)
            _wait(device)
            if turn:  # the first one chooses kernels
                best[i] = min(best[i], time.perf_counter() - started)
    return best[0] / best[1]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def slow_bf16(device: torch.device) -> str | None:
    """A line if fp32 is quicker on this device; None if bf16 is."""
    gain = bf16_gain(device)
    return None if gain > 1 else f"a matrix product in bf16 is {_compared(gain)} here; --precision fp32 is quicker"


def allow_tf32(allowed: bool) -> None:
    """Whether fp32 products and convolutions on GPUs round their factors to TF32's 10 bits, in the whole process.

    PyTorch's own default is yes for convolutions and no for products.
    """
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """`allow_tf32` for a while. With False what a training draws and judges is what sample.py and evaluate.py make."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    allow_tf32(allowed)
    try:
        yield
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before


def with_precision(config: Config, precision: str) -> Config:
    """Copy `config` with another train.precision."""
    return config.model_copy(update={"train": config.train.model_copy(update={"precision": precision})})


def kept_precision(config: Config, config_file: Path) -> Config:
    """Replace train.precision=auto by what a run's config.json says, if there is one: a run keeps its precision."""
    if config.train.precision != "auto":
        return config
    try:
        kept = json.loads(config_file.read_bytes())["train"]["precision"]
    except (OSError, ValueError, KeyError, TypeError):
        return config
    return with_precision(config, kept) if kept in ("fp32", "bf16") else config


def settle_precision(config: Config, device: torch.device) -> tuple[Config, str | None]:
    """Replace train.precision=auto by fp32 or bf16, as rank 0's device decides. Collective.

    Returns:
        The configuration, and a line about bf16 on this device if it is asked for or auto was; else None.
    """
    asked = config.train.precision
    gain = broadcast_json(bf16_gain(device)) if asked != "fp32" else 0.0
    if asked == "auto":
        config = with_precision(config, broadcast_json("bf16" if gain > _GAIN else "fp32"))
    if asked == "fp32":
        return config, None
    where = "GPU" if device.type == "cuda" else "processor"
    line = f"train.precision={asked}: a matrix product in bf16 is {_compared(gain)} on this {where}"
    if asked == "auto":
        return config, f"{line}; training in {config.train.precision}"
    return config, line if gain > 1 else f"{line}; fp32, or auto in a new run, would be quicker"


def _compared(gain: float) -> str:
    return f"{gain:.1f} times as fast as in fp32" if gain >= 1 else f"{1 / gain:.1f} times as slow as in fp32"
