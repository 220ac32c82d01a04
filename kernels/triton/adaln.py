"""The host's side of adaln_code.py: one launch forward, one backward.

Bytes of an activation element in bfloat16, at ROWS tokens a program (parts are float32, written once and read once):
    norm, modulate                     forward 4 (x, y);        backward 6 (dy, x, dx) + 16 / ROWS
    gate, residual, norm, modulate     forward 8 (x, h, x', y); backward 12 (dx', dy, x', h, dx, dh) + 24 / ROWS
Everything else is of the size of a token or a sample.
"""

from typing import Any

import torch
from torch import Tensor

from sadm_kernels.triton.launch import on_device

ROWS_FORWARD, ROWS_BACKWARD = 8, 32


def _kernels() -> Any:
    from sadm_kernels.triton import adaln_code

    return adaln_code


def parts(t: int) -> int:
    """Of how many programs' sums a sample of t tokens has its gradients of shift, scale and gate."""
    return -(-t // ROWS_BACKWARD)


def _shape(x: Tensor, rows: int) -> tuple[int, int, int, int, dict[str, int]]:
    """B, T, D, programs a sample, and what the kernel is compiled for."""
    b, t, d = x.shape
    block = max(16, 1 << (d - 1).bit_length())
    # Sums over a row meet at a barrier for each: on an H200 eight warps took 183 us for a backward pass of
    # [64, 256, 1152] with the gate, four 101 (commit 4460c4a).
    return b, t, d, -(-t // rows), {"ROWS": rows, "BLOCK": block, "num_warps": 4}


def forward(
    x: Tensor, h: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x', y, mean, rstd) of contiguous x and h [B, T, D]; x' is x where h is None. One launch."""
    b, t, d, programs, options = _shape(x, ROWS_FORWARD)
    x_out = x if h is None else torch.empty_like(x)
    y = torch.empty_like(x)
    mean, rstd = (torch.empty(b, t, dtype=torch.float32, device=x.device) for _ in range(2))
    with on_device(x.device):
        _kernels().forward[(b, programs)](
            x, x if h is None else h, shift if gate is None else gate, shift, scale, x_out, y, mean, rstd,
            0 if gate is None else gate.stride(0), shift.stride(0), scale.stride(0), t, d, eps,
            GATED=h is not None, **options,
        )  # fmt: skip
    return x_out, y, mean, rstd


def backward(
    dx_out: Tensor | None,
    dy: Tensor,
    x: Tensor,
    h: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dh, sums) for contiguous dx', dy, x', h; dh is empty where h is None.

    sums [2 or 3, B, programs a sample, D] float32: added over programs, the gradients of shift, scale and gate.
    """
    b, _, d, programs, options = _shape(x, ROWS_BACKWARD)
    gated = h is not None
    dx = torch.empty_like(x)
    dh = torch.empty_like(x if gated else x[:0])
    sums = torch.empty(3 if gated else 2, b, programs, d, dtype=torch.float32, device=x.device)
    with on_device(x.device):
        _kernels().backward[(b, programs)](
            dy if dx_out is None else dx_out, dy, x, x if h is None else h, scale if gate is None else gate, scale,
            mean, rstd, dx, dh if gated else dx, sums[-1], sums[0], sums[1],
            0 if gate is None else gate.stride(0), scale.stride(0), x.shape[1], d, programs, GATED=gated, **options,
        )  # fmt: skip
    return dx, dh, sums
