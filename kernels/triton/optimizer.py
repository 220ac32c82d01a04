"""The host's side of optimizer_code.py: one launch for each flat buffer."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sadm_kernels.triton.launch import on_device

if TYPE_CHECKING:
    from sadm_kernels.adamw import Buffers, Numbers

BLOCK = 512  # elements of a program: 4 a thread, in loads of 16 bytes


def _kernels() -> Any:
    from sadm_kernels.triton import optimizer_code

    return optimizer_code


def adamw_step(buffers: "Buffers", norm: Tensor, numbers: "Numbers") -> None:
    """adamw.adamw_step on a GPU, one launch; arguments are checked there."""
    master, gradient, exp_avg, exp_avg_sq, averages, weight = buffers
    max_norm, (beta1, beta2), eps, kept, step_size, root, shares = numbers
    n, missing = master.numel(), 4 - len(averages)
    with on_device(master.device):
        _kernels().adamw[(-(-n // BLOCK),)](
            master, gradient, exp_avg, exp_avg_sq, master if weight is None else weight,
            *averages, *[master] * missing, norm,
            n, max_norm, beta2, 1.0 - beta1, 1.0 - beta2, eps, kept, step_size, root, *shares, *[0.0] * missing,
            AVERAGES=len(averages), HAS_WEIGHT=weight is not None, CLIPPED=max_norm > 0, BLOCK=BLOCK,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


def restore_if_not_finite(norm: Tensor, tensors: Sequence[Tensor], saved: Sequence[Tensor]) -> None:
    """adamw.restore_if_not_finite on a GPU, one launch a tensor."""
    with on_device(norm.device):
        for tensor, kept in zip(tensors, saved, strict=True):
            n = tensor.numel()
            _kernels().copy_back[(-(-n // BLOCK),)](tensor, kept, norm, n, BLOCK=BLOCK, num_warps=4)
