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


@torch.library.custom_op("sadm_kernels::norm_modulate", mutates_args=())
def _norm_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean, rstd."""
    from sadm_kernels.triton import adaln

    return adaln.forward(x, None, None, shift, scale, EPS)[1:]


@_norm_modulate.register_fake
def _(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), _per_token(x), _per_token(x)


@torch.library.custom_op("sadm_kernels::norm_modulate_backward", mutates_args=())
def _norm_modulate_backward(
    dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, shift, scale."""
    from sadm_kernels.triton import adaln

    dx, _, _, d_shift, d_scale = adaln.backward(None, dy.contiguous(), x, None, None, scale, mean, rstd)
    return dx, d_shift.clone(), d_scale.clone()


@_norm_modulate_backward.register_fake
def _(dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), _per_sample(scale), _per_sample(scale)


@torch.library.custom_op("sadm_kernels::gate_norm_modulate", mutates_args=())
def _gate_norm_modulate(
    x: Tensor, h: Tensor, gate: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x', y, mean, rstd."""
    from sadm_kernels.triton import adaln

    return adaln.forward(x, h, gate, shift, scale, EPS)


@_gate_norm_modulate.register_fake
def _(x: Tensor, h: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x), _per_token(x), _per_token(x)


@torch.library.custom_op("sadm_kernels::gate_norm_modulate_backward", mutates_args=())
def _gate_norm_modulate_backward(
    dx_out: Tensor, dy: Tensor, x_out: Tensor, h: Tensor, gate: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, h, gate, shift, scale."""
    from sadm_kernels.triton import adaln

    dx, dh, d_gate, d_shift, d_scale = adaln.backward(
        dx_out.contiguous(), dy.contiguous(), x_out, h, gate, scale, mean, rstd
    )
    return dx, dh, d_gate.clone(), d_shift.clone(), d_scale.clone()


@_gate_norm_modulate_backward.register_fake
def _(
    dx_out: Tensor, dy: Tensor, x_out: Tensor, h: Tensor, gate: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    d_gate, d_shift, d_scale = (_per_sample(scale) for _ in range(3))
    return torch.empty_like(x_out), torch.empty_like(h), d_gate, d_shift, d_scale


def _per_token(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=torch.float32)


def _per_sample(scale: Tensor) -> Tensor:
    return scale.new_empty(scale.shape)


def _keep_norm(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    x, _, scale = inputs
    ctx.set_materialize_grads(True)
    ctx.save_for_backward(x, scale, *output[1:])


def _differentiate_norm(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, scale, mean, rstd = ctx.saved_tensors
    gradients: tuple[Tensor, Tensor, Tensor] = _norm_modulate_backward(dy, x, scale, mean, rstd)
    return gradients


def _keep_gate(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    _, h, gate, _, scale = inputs
    x_out, _, mean, rstd = output
    ctx.save_for_backward(x_out, h, gate, scale, mean, rstd)


def _differentiate_gate(ctx: Any, dx_out: Tensor, dy: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
    gradients: tuple[Tensor, ...] = _gate_norm_modulate_backward(dx_out, dy, *ctx.saved_tensors)
    return gradients


_norm_modulate.register_autograd(_differentiate_norm, setup_context=_keep_norm)
_gate_norm_modulate.register_autograd(_differentiate_gate, setup_context=_keep_gate)
