"""Collectives as operators that autograd differentiates and torch.compile traces; the reference is written with them.

Operators take a process group by its name, because torch.compile cannot put an object into a graph. Compiled code
keeps their order, and so all ranks must compile the same program.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from sadm_kernels.gathering import Gathering, agreed_weight
from sadm_kernels.samples import Samples, options_of


def group_of(name: str) -> dist.ProcessGroup:
    """The process group of this name."""
    return _resolve_process_group(name)  # type: ignore[arg-type]


def _refuse_second_derivative() -> None:
    """Autograd sees one rank's share of a collective only; torch's own once_differentiable misses autograd.grad."""
    if torch.is_grad_enabled():
        raise RuntimeError("structure_loss with group=: no second derivative (create_graph=True); use group=None")


@torch.library.custom_op("sadm_kernels::gather", mutates_args=())
def gather(rows: Tensor, group: str) -> Tensor:
    """Rows [b, ...] of all ranks as [ranks * b, ...]; the gradient of a row is the sum of what all ranks ask of it."""
    return Gathering(rows, group_of(group)).wait()


@gather.register_fake
def _(rows: Tensor, group: str) -> Tensor:
    return rows.new_empty((dist.get_world_size(group_of(group)) * rows.shape[0], *rows.shape[1:]))


def _save_group(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.group = inputs[1]


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    _refuse_second_derivative()
    group = group_of(ctx.group)
    return sum_ranks(grad, ctx.group, False).chunk(dist.get_world_size(group))[dist.get_rank(group)], None


gather.register_autograd(_gather_backward, setup_context=_save_group)


@torch.library.custom_op("sadm_kernels::sum_ranks", mutates_args=())
def sum_ranks(value: Tensor, group: str, shared: bool) -> Tensor:
    """Sum over ranks. shared: every rank goes on to its own loss with it, so gradients are summed as well."""
    value = value.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(value, group=group_of(group))
    return value


@sum_ranks.register_fake
def _(value: Tensor, group: str, shared: bool) -> Tensor:
    return torch.empty_like(value, memory_format=torch.contiguous_format)


def _save_sum(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.group, ctx.shared = inputs


def _sum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    _refuse_second_derivative()
    return sum_ranks(grad, ctx.group, False) if ctx.shared else grad, None, None


sum_ranks.register_autograd(_sum_backward, setup_context=_save_sum)


@torch.library.custom_op("sadm_kernels::agree", mutates_args=())
def agree(
    real: Tensor,
    fake: Tensor,
    weight: Tensor | None,
    labels: Tensor | None,
    queued: int,
    relation: str,
    penalty: str,
    normalize: str,
    tau: Tensor | None,
    delta: Tensor | None,
    group: str,
) -> Tensor:
    """`agreed_weight` of the reference: float64 [b], ones where no rank passed weights."""
    options = options_of(relation, penalty, normalize, tau, delta)._asdict()
    batch = Samples(real, fake, weight, labels)
    found = agreed_weight(batch, queued, group_of(group), {**options, "impl": "reference"})
    return real.new_ones(len(real), dtype=torch.float64) if found is None else found.to(torch.float64, copy=True)


@agree.register_fake
def _(real: Tensor, fake: Tensor, *_: Any) -> Tensor:
    return real.new_empty(real.shape[:1], dtype=torch.float64)


def _save_dtype(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.dtype = None if inputs[2] is None else inputs[2].dtype


def _agree_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (None, None, None if ctx.dtype is None else grad.to(ctx.dtype), *(None,) * 8)


agree.register_autograd(_agree_backward, setup_context=_save_dtype)
