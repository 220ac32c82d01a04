"""adaLN's elementwise work, fused: LayerNorm and modulation, and before them the gate and the residual sum.

Peebles & Xie, "Scalable Diffusion Models with Transformers", 2022 (adaLN-Zero). x, h: [B, T, D]; shift, scale, gate:
[B, D], one row a sample, views of a wider tensor or not. On a GPU with Triton each is one kernel, which reads and
writes every activation once, forward and backward; elsewhere it is the tensor operations of the definition, which a
compiler fuses. Sums and statistics are float32. Not differentiable twice.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sadm_kernels import triton

EPS = 1e-6


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm of each token, without weights and eps = 1e-6, times 1 + scale, plus shift: [B, T, D]."""
    if _on_gpu(x):
        y: Tensor = _norm_modulate(x.contiguous(), shift, scale)[0]
        return y
    return _modulated(x, shift, scale)


def gate_residual_norm_modulate(
    x: Tensor, h: Tensor, gate: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """x' = x + gate h, and `layer_norm_modulate` of it: both [B, T, D]."""
    if _on_gpu(x):
        x_out, y, *_ = _gate_norm_modulate(x.contiguous(), h.contiguous(), gate, shift, scale)
        return x_out, y
    return gate_residual_norm_modulate_definition(x, h, gate, shift, scale)


def gate_residual_norm_modulate_definition(
    x: Tensor, h: Tensor, gate: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """`gate_residual_norm_modulate` in tensor operations."""
    x = x + gate[:, None] * h
    return x, _modulated(x, shift, scale)


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale[:, None]) + shift[:, None]


def _on_gpu(x: Tensor) -> bool:
    # A GPU cannot be asked while torch.compile traces, and compiled code for one needs Triton anyway.
    return x.is_cuda and (torch.compiler.is_compiling() or triton.why_missing() == "ok")


# Operators by schema: `torch.library.custom_op` wraps each call in Python that takes longer than the launch.
_NORM, _NORM_BACKWARD, _GATE, _GATE_BACKWARD = (
    f"sadm_kernels::{name}{way}" for name in ("norm_modulate", "gate_norm_modulate") for way in ("", "_backward")
)
for _name, _schema in {
    _NORM: "(Tensor x, Tensor shift, Tensor scale) -> (Tensor, Tensor, Tensor)",
    _NORM_BACKWARD: "(Tensor dy, Tensor x, Tensor scale, Tensor mean, Tensor rstd) -> (Tensor, Tensor)",
    _GATE: "(Tensor x, Tensor h, Tensor gate, Tensor shift, Tensor scale) -> (Tensor, Tensor, Tensor, Tensor)",
    _GATE_BACKWARD: "(Tensor dx_out, Tensor dy, Tensor x_out, Tensor h, Tensor gate, Tensor scale, Tensor mean,"
    " Tensor rstd) -> (Tensor, Tensor, Tensor)",
}.items():
    torch.library.define(_name, _schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))

_norm_modulate: Any = torch.ops.sadm_kernels.norm_modulate.default
_norm_modulate_backward: Any = torch.ops.sadm_kernels.norm_modulate_backward.default
_gate_norm_modulate: Any = torch.ops.sadm_kernels.gate_norm_modulate.default
_gate_norm_modulate_backward: Any = torch.ops.sadm_kernels.gate_norm_modulate_backward.default


def _host() -> Any:
    from sadm_kernels.triton import adaln

    return adaln


@torch.library.impl(_NORM, "default")
def _(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean, rstd."""
    y: tuple[Tensor, Tensor, Tensor] = _host().forward(x, None, None, shift, scale, EPS)[1:]
    return y


@torch.library.impl(_NORM_BACKWARD, "default")
def _(dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of x, and parts of those of shift and scale."""
    dx, _, parts = _host().backward(None, dy.contiguous(), x, None, None, scale, mean, rstd)
    return dx, parts


@torch.library.impl(_GATE, "default")
def _(x: Tensor, h: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x', y, mean, rstd."""
    found: tuple[Tensor, Tensor, Tensor, Tensor] = _host().forward(x, h, gate, shift, scale, EPS)
    return found


@torch.library.impl(_GATE_BACKWARD, "default")
def _(
    dx_out: Tensor, dy: Tensor, x_out: Tensor, h: Tensor, gate: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x and h, and parts of those of shift, scale and gate."""
    found: tuple[Tensor, Tensor, Tensor] = _host().backward(
        dx_out.contiguous(), dy.contiguous(), x_out, h, gate, scale, mean, rstd
    )
    return found


@torch.library.register_fake(_NORM)
def _(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), _per_token(x), _per_token(x)


@torch.library.register_fake(_NORM_BACKWARD)
def _(dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), _parts(x, 2)


@torch.library.register_fake(_GATE)
def _(x: Tensor, h: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x), _per_token(x), _per_token(x)


@torch.library.register_fake(_GATE_BACKWARD)
def _(
    dx_out: Tensor, dy: Tensor, x_out: Tensor, h: Tensor, gate: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x_out), torch.empty_like(h), _parts(x_out, 3)


def _per_token(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=torch.float32)


def _parts(x: Tensor, gradients: int) -> Tensor:
    b, t, d = x.shape
    return x.new_empty((gradients, b, _host().parts(t), d), dtype=torch.float32)


def _keep_norm(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    x, _, scale = inputs
    ctx.set_materialize_grads(True)
    ctx.save_for_backward(x, scale, *output[1:])


def _differentiate_norm(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, scale, mean, rstd = ctx.saved_tensors
    dx, parts = _norm_modulate_backward(dy, x, scale, mean, rstd)
    d_shift, d_scale = parts.sum(2).to(scale.dtype).unbind()
    return dx, d_shift, d_scale


def _keep_gate(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    _, h, gate, _, scale = inputs
    x_out, _, mean, rstd = output
    ctx.save_for_backward(x_out, h, gate, scale, mean, rstd)


def _differentiate_gate(ctx: Any, dx_out: Tensor, dy: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
    x_out, h, gate, scale, mean, rstd = ctx.saved_tensors
    dx, dh, parts = _gate_norm_modulate_backward(dx_out, dy, x_out, h, gate, scale, mean, rstd)
    # The sums over parts are tensor operations out here, so that a compiler joins them with what reads them.
    d_shift, d_scale, d_gate = parts.sum(2).to(scale.dtype).unbind()
    return dx, dh, d_gate, d_shift, d_scale


torch.library.register_autograd(_NORM, _differentiate_norm, setup_context=_keep_norm)
torch.library.register_autograd(_GATE, _differentiate_gate, setup_context=_keep_gate)
