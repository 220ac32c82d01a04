"""The host's side of random_code.py."""

from typing import Any

import torch
from torch import Tensor

from sadm_kernels.triton.launch import on_device

BLOCK = 256  # pairs of numbers, or fours, of a program
PRECISE = True


def _kernels() -> Any:
    from sadm_kernels.triton import random_code

    return random_code


def draw(key: int, stream: int, firsts: tuple[int, int], sample_ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """streams.philox_draw on a GPU, one launch; arguments are checked there."""
    samples, half = len(sample_ids), -(-count // 2)
    normal = torch.empty(samples, count, dtype=torch.float32, device=sample_ids.device)
    first = torch.empty(2, samples, dtype=torch.float64, device=sample_ids.device)
    if samples and count:
        with on_device(sample_ids.device):
            _kernels().draw[(samples, -(-half // BLOCK))](
                sample_ids, normal, first,
                key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF, stream, *firsts, samples, count, half,
                PRECISE=PRECISE, BLOCK=BLOCK, num_warps=4,
            )  # fmt: skip
    return normal, first


def keep(key: int, stream: int, sample_ids: Tensor, count: int, rate: float) -> Tensor:
    """streams.philox_keep on a GPU, one launch; arguments are checked there."""
    kept = torch.empty(len(sample_ids), count, dtype=torch.bool, device=sample_ids.device)
    if kept.numel():
        with on_device(sample_ids.device):
            _kernels().keep[(len(sample_ids), -(-count // (4 * BLOCK)))](
                sample_ids, kept, key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF, stream, rate, count,
                BLOCK=BLOCK, num_warps=4,
            )  # fmt: skip
    return kept
