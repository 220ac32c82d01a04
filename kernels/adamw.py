"""AdamW in one pass over memory: clipping, moments, fp32 master, rounded weight and moving averages.

The gradient's norm stays on the device: the pass reads it there, and writes nothing where it is not finite. So a
training step needs no answer from the device before the next one is launched.

`definition` is the meaning: AdamW (Loshchilov & Hutter, "Decoupled weight decay regularization", 2019) after
torch.nn.utils.clip_grads_with_norm_, the gradient widened to float32 first. On a CPU with AVX2 or AVX-512, it and the
C++ kernel give the bits of torch.optim.AdamW(fused=True), except in the last n % 16 elements, where torch's scalar code
fuses another product than its vectors do. The Triton kernel gives the bits that `definition` gives on such a CPU.
"""

import ctypes
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sadm_kernels import native, triton

MOST_AVERAGES = 4
_CLIP_EPS = 1e-6  # as torch.nn.utils.clip_grads_with_norm_ adds
_AT_ONCE = 1 << 16  # elements: temporaries of the definition stay in a CPU's cache
_BLOCK = 1 << 12  # kBlock of adamw.cpp


class Buffers(NamedTuple):
    """What one step reads and changes, [n] each; see `adamw_step`."""

    master: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    averages: Sequence[Tensor]
    weight: Tensor | None


class Numbers(NamedTuple):
    """The numbers of one step, as the kernels take them."""

    max_norm: float
    betas: tuple[float, float]
    eps: float
    kept: float  # the share of the weights that decay leaves
    step_size: float  # lr / (1 - beta1^step)
    root: float  # sqrt(1 - beta2^step)
    shares: tuple[float, ...]  # of the new master in each average


def bytes_per_element(gradient: torch.dtype, weight: torch.dtype | None, averages: int) -> int:
    """What one step reads and writes for each element: master, two moments and averages both ways, and the rest once.

    The norm before it reads the gradient once more, which is counted here.
    """
    return 2 * 4 * (3 + averages) + 2 * gradient.itemsize + (0 if weight is None else weight.itemsize)


def adamw_step(
    master: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    averages: Sequence[Tensor] = (),
    weight: Tensor | None = None,
    *,
    norm: Tensor,
    max_norm: float,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    decays: Sequence[float] = (),
    impl: str = "auto",
) -> None:
    """Take one step, in place; none if `norm` is not finite.

    Args:
        master, exp_avg, exp_avg_sq: float32 [n], contiguous, as all that follow.
        gradient: float32 or bfloat16 [n].
        averages: up to 4 moving averages of the master, float32 [n].
        weight: float32 or bfloat16 [n], set to the new master, rounded to nearest even.
        norm: 0-d float32 on the same device, of the whole gradient of which `gradient` is a part.
        max_norm: the gradient is scaled so that its norm is at most this; 0: it is not.
        step: the number of this step, from 1, for the bias corrections.
        decays: how much of each average stays.
        impl: "auto", "native", "triton" or "definition".

    Raises:
        ValueError: shapes, dtypes or numbers that do not fit.
    """
    buffers = Buffers(master, gradient, exp_avg, exp_avg_sq, averages, weight)
    _check(buffers, decays, step)
    numbers = Numbers(
        max_norm,
        betas,
        eps,
        kept=1.0 - lr * weight_decay,
        step_size=lr / (1.0 - betas[0] ** step),
        root=math.sqrt(1.0 - betas[1] ** step),
        shares=tuple(1.0 - decay for decay in decays),
    )
    chosen = _chosen(impl, master.device) if master.numel() else "definition"
    if chosen == "native":
        _native(buffers, norm, numbers)
    elif chosen == "triton":
        from sadm_kernels.triton import optimizer

        optimizer.adamw_step(buffers, norm, numbers)
    else:
        definition(buffers, norm, numbers)


@torch.no_grad()
def definition(buffers: Buffers, norm: Tensor, numbers: Numbers) -> None:
    """`adamw_step` in tensor operations. On a CPU it looks at `norm`; on a GPU it does not wait for it."""
    master, gradient, exp_avg, exp_avg_sq, averages, weight = buffers
    max_norm, (beta1, beta2), eps, kept, step_size, root, shares = numbers
    finite = norm.isfinite()
    if norm.device.type == "cpu" and not finite:
        return
    clip = (max_norm / (norm + _CLIP_EPS)).clamp(max=1.0) if max_norm > 0 else torch.ones_like(norm)
    divisor = norm.new_full((), root)  # a tensor: by a number, a GPU would multiply by its inverse
    at_once = _AT_ONCE if master.device.type == "cpu" else max(1, master.numel())
    for at in range(0, master.numel(), at_once):
        part = slice(at, at + at_once)
        g = gradient[part].float() * clip
        m = exp_avg[part].lerp(g, 1.0 - beta1)
        v = (exp_avg_sq[part] * beta2).addcmul_(g, g, value=1.0 - beta2)
        # By way of float64: torch's float32 root is wrongly rounded for every fifth number on a CPU.
        denominator = v.double().sqrt_().float().div_(divisor).add_(eps)
        new = master[part] * kept - m * step_size / denominator
        changed = [(exp_avg[part], m), (exp_avg_sq[part], v), (master[part], new)]
        for mean, share in zip(averages, shares, strict=True):
            changed.append((mean[part], mean[part].lerp(new, share)))
        if weight is not None:
            changed.append((weight[part], new.to(weight.dtype)))
        for old, value in changed:
            torch.where(finite, value, old, out=old)


def total_norm(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    """The norm of contiguous float32 or bfloat16 tensors together: 0-d float64 on `device`, which is theirs.

    On a CPU squares are added in float64; on a GPU in float32 as a tree (torch), and between tensors in float64.
    """
    if device.type == "cpu" and native.why_missing() == "ok":
        squares = sum(_native_squares(gradient) for gradient in gradients)
        return torch.tensor(math.sqrt(squares), dtype=torch.float64, device=device)
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=device)
    dtype = torch.float32 if device.type == "cuda" else torch.float64
    norms = torch._foreach_norm(list(gradients), 2, dtype=dtype)
    return torch.linalg.vector_norm(torch.stack(norms).double())


@torch.no_grad()
def restore_if_not_finite(norm: Tensor, tensors: Sequence[Tensor], saved: Sequence[Tensor]) -> None:
    """Copy each of `saved` into its tensor (contiguous, of any dtype) where 0-d float32 `norm` is not finite.

    The host does not wait for `norm`; where it is finite, a CPU touches none of the tensors.
    """
    if norm.device.type == "cpu":
        if native.why_missing() == "ok":
            _native_restore(norm, tensors, saved)
        elif not norm.isfinite():
            torch._foreach_copy_(list(tensors), list(saved))
        return
    if triton.why_missing() == "ok":
        from sadm_kernels.triton import optimizer

        optimizer.restore_if_not_finite(norm, tensors, saved)
        return
    finite = norm.isfinite()
    for tensor, kept in zip(tensors, saved, strict=True):
        torch.where(finite, tensor, kept, out=tensor)


def _check(buffers: Buffers, decays: Sequence[float], step: int) -> None:
    master, gradient, exp_avg, exp_avg_sq, averages, weight = buffers
    narrow = (torch.float32, torch.bfloat16)
    named = {"master": master, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    named |= {f"averages[{i}]": mean for i, mean in enumerate(averages)}
    for name, x in named.items():
        if x.dtype != torch.float32:
            raise ValueError(f"{name}.dtype={x.dtype}: must be torch.float32")
    for name, other in (("gradient", gradient), ("weight", weight)):
        if other is not None:
            named[name] = other
            if other.dtype not in narrow:
                raise ValueError(f"{name}.dtype={other.dtype}: must be torch.float32 or torch.bfloat16")
    for name, x in named.items():
        if x.shape != master.shape or x.ndim != 1 or not x.is_contiguous() or x.device != master.device:
            raise ValueError(
                f"{name}: {list(x.shape)} on {x.device}, must be contiguous [n], of master's n={master.numel()} and"
                f" on its {master.device}"
            )
    if len(averages) != len(decays) or len(averages) > MOST_AVERAGES:
        raise ValueError(f"{len(averages)} averages, {len(decays)} decays: must be as many, at most {MOST_AVERAGES}")
    if step < 1:
        raise ValueError(f"step={step}: steps are counted from 1")


def _chosen(impl: str, device: torch.device) -> str:
    if impl != "auto":
        return impl
    if device.type == "cpu":
        return "native" if native.why_missing() == "ok" else "definition"
    return "triton" if device.type == "cuda" and triton.why_missing() == "ok" else "definition"


def _dtype(x: Tensor) -> int:
    return 2 if x.dtype == torch.bfloat16 else 0  # kBFloat16, kFloat32 of structure.h


def _native(buffers: Buffers, norm: Tensor, numbers: Numbers) -> None:
    master, gradient, exp_avg, exp_avg_sq, averages, weight = buffers
    task = native.AdamWStep(
        master=master.data_ptr(),
        gradient=gradient.data_ptr(),
        first=exp_avg.data_ptr(),
        second=exp_avg_sq.data_ptr(),
        weight=None if weight is None else weight.data_ptr(),
        average=tuple(mean.data_ptr() for mean in averages),
        norm=norm.data_ptr(),
        count=master.numel(),
        share=numbers.shares,
        max_norm=numbers.max_norm,
        rest1=1.0 - numbers.betas[0],
        beta2=numbers.betas[1],
        rest2=1.0 - numbers.betas[1],
        eps=numbers.eps,
        kept=numbers.kept,
        step_size=numbers.step_size,
        root_of_correction=numbers.root,
        averages=len(averages),
        gradient_dtype=_dtype(gradient),
        weight_dtype=0 if weight is None else _dtype(weight),
        threads=native.threads(),
    )
    native.library().adamw_step(ctypes.byref(task))


def _native_squares(x: Tensor) -> float:
    parts = torch.empty(-(-x.numel() // _BLOCK), dtype=torch.float64, device="cpu")
    return float(
        native.library().sum_of_squares(x.data_ptr(), x.numel(), _dtype(x), parts.data_ptr(), native.threads())
    )


def _native_restore(norm: Tensor, tensors: Sequence[Tensor], saved: Sequence[Tensor]) -> None:
    n = len(tensors)
    pointers, sizes = ctypes.c_void_p * n, ctypes.c_int64 * n
    native.library().restore_if_not_finite(
        norm.data_ptr(),
        pointers(*(x.data_ptr() for x in tensors)),
        pointers(*(x.data_ptr() for x in saved)),
        sizes(*(x.numel() * x.element_size() for x in tensors)),
        n,
    )
