"""What each backend can do, and which one runs.

The reference can do everything. A fused backend has kernels for what its row of FUSED names, and nothing else: a
relation that only the reference knows works with impl="auto", which says once that it takes the slower backend.
"""

import warnings
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sadm_kernels import native, triton
from sadm_kernels.samples import Options, Samples

IMPLEMENTATIONS = ("auto", "reference", "native", "triton")


class Fused(NamedTuple):
    """What a fused backend has kernels for. No backend but the reference differentiates twice or a weight."""

    device: str
    dtypes: tuple[torch.dtype, ...]
    relation: tuple[str, ...] = ("euclidean", "cosine", "gaussian")
    penalty: tuple[str, ...] = ("squared", "absolute", "huber")
    normalize: tuple[str, ...] = ("unit", "mean", "none")


FUSED = {
    "native": Fused("cpu", (torch.float16, torch.bfloat16, torch.float32, torch.float64)),
    "triton": Fused("cuda", (torch.float16, torch.bfloat16, torch.float32)),
}
_told: set[str] = set()


def backends() -> dict[str, str]:
    """Every backend by name: "ok", or why it cannot be used here and what to do. FUSED says what each one can do."""
    return {"reference": "ok", "native": native.why_missing(), "triton": triton.why_missing()}


def choose(impl: str, batch: Samples, options: Options) -> str:
    """The backend that runs. "auto" takes the fused one of the features' device where it can do what is asked.

    Raises:
        ValueError: `impl` cannot do it.
        RuntimeError: `impl` is not available here.
    """
    device = batch.real.device.type
    if impl == "reference":
        return impl
    if impl == "auto":
        fused = next((name for name, able in FUSED.items() if able.device == device), None)
        if fused is None or _status(fused) != "ok":
            return "reference"
        unknown = _unknown_option(fused, options)
        if unknown:
            _say_once(f"{unknown}; impl='auto' takes the reference, which is slower and needs B x B matrices")
        return "reference" if unknown or _missing_derivative(fused, batch) else fused
    where = FUSED[impl].device
    if device != where:
        raise ValueError(f"impl={impl!r}: runs on {where}, but the features are on {device}; use impl='auto'")
    status = _status(impl)
    if status != "ok":
        raise RuntimeError(f"impl={impl!r}: {status}; or use impl='auto'")
    lack = _unknown_option(impl, options) or _missing_derivative(impl, batch)
    if lack:
        raise ValueError(f"{lack}; use impl='reference'")
    return impl


def transformed(*tensors: Tensor | None) -> bool:
    """Whether torch.func transforms are active or one of `tensors` carries a forward-mode tangent."""
    if torch._C._are_functorch_transforms_active():  # what autograd.Function asks; there is no public name
        return True
    if forward_ad._current_level < 0:  # outside dual_level; unpack_dual would say so more slowly
        return False
    return any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def _status(name: str) -> str:
    """What `backends()` says of a fused backend, without asking the other one."""
    if name == "native":
        return native.why_missing()
    # A GPU cannot be asked while torch.compile traces, and compiled code for one needs Triton anyway.
    return "ok" if torch.compiler.is_compiling() else triton.why_missing()


def _unknown_option(name: str, options: Options) -> str:
    """The option that fused backend `name` has no kernel for, as a clause; "" if it knows all."""
    able = FUSED[name]
    for option in ("relation", "penalty", "normalize"):
        value, known = getattr(options, option), getattr(able, option)
        if value not in known:
            return f"{option}={value!r}: impl={name!r} has {', '.join(known)}"
    return ""


def _missing_derivative(name: str, batch: Samples) -> str:
    """The dtype or derivative that fused backend `name` does not have, as a clause; "" if it has all."""
    for side, x in (("real", batch.real), ("fake", batch.fake)):
        if x.dtype not in FUSED[name].dtypes:
            return f"{side}.dtype={x.dtype}: impl={name!r} has no {str(x.dtype).removeprefix('torch.')}"
    if batch.weight is not None and batch.weight.requires_grad:
        return f"weight.requires_grad=True: impl={name!r} has no gradient for it"
    if transformed(*batch[:3]):
        return f"impl={name!r} has no rule for torch.func transforms and forward-mode AD"
    return ""


def _say_once(message: str) -> None:
    # torch.compile cannot trace warnings.warn.
    if torch.compiler.is_compiling() or message in _told:
        return
    _told.add(message)
    warnings.warn(f"structure_loss: {message}", stacklevel=4)
