"""The fused loss as a torch operator and as an autograd function: what torch.compile and autograd see of a backend.

The gradients come with the loss, in one sequence of passes; backward only scales them, out of place, so it can be
repeated. (A micro-batch on a GPU keeps pair weights instead and multiplies them in the backward pass: fewer launches.)
It is not differentiable again: that is refused, never left out. Compiled code calls the operator, which holds the
collectives of a process group as well; plain eager code calls the function, which saves the operator's Python layers
(a few times the kernel's own time at small batches).

A backend takes its rows against all columns. A queue's pairs count twice, once each way, but have one way among them:
the sums of all columns are doubled, and those of the batch's columns, where both ways are, taken off once. That is one
more pass over the batch, without gradients, and only where there is a queue.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sadm_kernels import native, triton
from sadm_kernels.collectives import group_of
from sadm_kernels.gathering import Gathering, Shared, agreed_weight, send
from sadm_kernels.samples import Options, Pairs, Samples, compute_dtype, options_of

_BACKENDS: dict[str, ModuleType] = {"native": native, "triton": triton}
_SMALLEST = torch.finfo(torch.float32).tiny  # sum of pair weights that counts: its inverse is finite in float32


def _add_nothing(sums: Tensor) -> Tensor:
    return sums


def _both_ways(sums: Callable[[Pairs], Tensor], p: Pairs) -> Tensor:
    """Sums over all ordered pairs. A (row, queue) pair is visited once but counts twice."""
    return sums(p) if not p.queued else 2.0 * sums(p) - sums(p.without_queue)


def _evaluate(
    backend: str, p: Pairs, need: tuple[bool, bool], add_ranks: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """S (0-d), 1 / sum(omega) (0-d), and the gradients of S * sum(omega): [b, d], or None where not needed."""
    real, fake, *_ = p.samples
    dtype = compute_dtype(real)
    if len(real) < 2 or not p.own or real.numel() == 0:
        nothing = (real.sum() + fake.sum()).to(dtype) * 0.0  # no pair; NaN for NaN
        no_real, no_fake = (real.new_zeros(len(p.own), real.shape[1], dtype=dtype) if n else None for n in need)
        return nothing, torch.ones_like(nothing), no_real, no_fake
    module, moments = _BACKENDS[backend], None
    if p.options.normalize == "mean" and p.options.relation != "cosine":
        sums = add_ranks(_both_ways(module.distance_sums, p))
        mean = sums[:2] / sums[2].clamp_min(_SMALLEST)
        moments = torch.cat([1.0 / torch.where(mean == 0, 1.0, mean), torch.zeros_like(mean)])
        if any(need):
            slopes = add_ranks(_both_ways(lambda part: module.slope_sums(part, moments), p))
            moments[2:] = slopes[:2] / slopes[2].clamp_min(_SMALLEST)
    sums, grad_real, grad_fake = module.loss_and_gradients(p, moments, *need)
    if p.queued:
        sums = 2.0 * sums - module.loss_and_gradients(p.without_queue, moments, False, False)[0]
    sums = add_ranks(sums)
    loss_sum, total = sums.unbind()
    inverse_total = total.reciprocal()
    if p.samples.weight is not None or p.samples.labels is not None:  # perhaps no pair counts: loss and gradient are 0
        inverse_total.masked_fill_(total < _SMALLEST, 0.0)
    return (loss_sum * inverse_total).to(dtype), inverse_total.to(dtype), grad_real, grad_fake


def _pairs(batch: Samples, options: Options, queue: Samples | None, shared: Shared | None) -> Pairs:
    """The pairs of a batch's rows with the batch (that of all ranks, if `shared`) and the queue."""
    columns, first, queued = batch, 0, 0
    if shared is not None:
        all_fake = Gathering(batch.fake, shared.group)  # on its way before the others are waited for
        all_real, all_weight, all_labels = shared.wait()
        columns = Samples(all_real, all_fake.wait(), all_weight, all_labels)
        first = dist.get_rank(shared.group) * len(batch.real)
    if queue is not None:
        columns, queued = columns.followed_by(queue), len(queue.real)
    return Pairs(columns.alike(), range(first, first + len(batch.real)), options, queued)


def _send(batch: Samples, options: Options, queue: Samples | None, backend: str, group: dist.ProcessGroup) -> Shared:
    """Start sending what the ranks agree on. Collective."""
    about = {**options._asdict(), "impl": backend}
    weight = agreed_weight(batch, 0 if queue is None else len(queue.real), group, about)
    return send(batch.real, weight, batch.labels, queue, group)


def _forward(
    batch: Samples,
    options: Options,
    queue: Samples | None,
    backend: str,
    need: tuple[bool, bool],
    shared: Shared | None,
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """S (0-d), 1 / sum(omega) (0-d), and the gradients of S * sum(omega), of the shapes of real and of fake."""

    def add_ranks(sums: Tensor) -> Tensor:
        sums = sums.contiguous()
        dist.all_reduce(sums, group=None if shared is None else shared.group)
        return sums

    p = _pairs(batch, options, queue, shared)
    loss, inverse_total, *gradients = _evaluate(backend, p, need, _add_nothing if shared is None else add_ranks)
    sides = zip(gradients, batch[:2], strict=True)
    return loss, inverse_total, [g if g is None or g.shape == x.shape else _narrowed(g, x) for g, x in sides]


def _narrowed(gradient: Tensor, x: Tensor) -> Tensor:
    """The gradient of x [b, d] out of that of x with zeros behind it (`Samples.alike`)."""
    return gradient[:, : x.shape[1]].contiguous()


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():  # torch's own once_differentiable does not see torch.autograd.grad
        raise RuntimeError(
            "structure_loss: its fused gradient has no second derivative (create_graph=True); use impl='reference'"
        )


def _scaled(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    """The gradients of real and fake for the gradient of the loss, in their dtypes; None where none was needed."""
    _refuse_second_derivative()
    inverse_total, *gradients = ctx.saved_tensors
    scale = grad * inverse_total
    sides = zip(gradients, ctx.dtypes, ctx.needed, strict=True)
    return [(g * scale).to(dtype) if needed else None for g, dtype, needed in sides]


@torch.library.custom_op("sadm_kernels::structure_loss", mutates_args=())
def _structure_loss(
    real: Tensor,
    fake: Tensor,
    weight: Tensor | None,
    labels: Tensor | None,
    queue_real: Tensor | None,
    queue_fake: Tensor | None,
    queue_weight: Tensor | None,
    queue_labels: Tensor | None,
    relation: str,
    penalty: str,
    normalize: str,
    tau: Tensor | None,
    delta: Tensor | None,
    backend: str,
    need_real: bool,
    need_fake: bool,
    group: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, options = Samples(real, fake, weight, labels), options_of(relation, penalty, normalize, tau, delta)
    queue = None
    if queue_real is not None and queue_fake is not None:
        queue = Samples(queue_real, queue_fake, queue_weight, queue_labels)
    shared = _send(batch, options, queue, backend, group_of(group)) if group else None
    loss, inverse_total, gradients = _forward(batch, options, queue, backend, (need_real, need_fake), shared)
    grad_real, grad_fake = (loss.new_empty(0) if grad is None else grad for grad in gradients)
    return loss, inverse_total, grad_real, grad_fake


@_structure_loss.register_fake
def _(
    real: Tensor,
    fake: Tensor,
    weight: Tensor | None,
    labels: Tensor | None,
    queue_real: Tensor | None,
    queue_fake: Tensor | None,
    queue_weight: Tensor | None,
    queue_labels: Tensor | None,
    relation: str,
    penalty: str,
    normalize: str,
    tau: Tensor | None,
    delta: Tensor | None,
    backend: str,
    need_real: bool,
    need_fake: bool,
    group: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(real, fake)
    grad_real, grad_fake = (
        x.new_empty(x.shape if need else (0,), dtype=dtype) for x, need in ((real, need_real), (fake, need_fake))
    )
    return real.new_empty((), dtype=dtype), real.new_empty((), dtype=dtype), grad_real, grad_fake


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.dtypes = (inputs[0].dtype, inputs[1].dtype)
    ctx.needed = inputs[14:16]


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return (*_scaled(ctx, grad), *([None] * 15))


_structure_loss.register_autograd(_backward, setup_context=_save)


class _Eager(torch.autograd.Function):
    """The operator's eager twin; with `shared` own rows against the columns of all ranks."""

    @staticmethod
    def forward(
        ctx: Any,
        real: Tensor,
        fake: Tensor,
        weight: Tensor | None,
        labels: Tensor | None,
        options: Options,
        queue: Samples | None,
        backend: str,
        needed: tuple[bool, bool],
        shared: Shared | None,
    ) -> Tensor:
        batch = Samples(real, fake, weight, labels)
        loss, inverse_total, gradients = _forward(batch, options, queue, backend, needed, shared)
        ctx.save_for_backward(inverse_total, *gradients)
        ctx.dtypes = (real.dtype, fake.dtype)
        ctx.needed = needed  # not needs_input_grad, which is set without autograd as well
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*_scaled(ctx, grad), *([None] * 7))


class _Few(torch.autograd.Function):
    """A micro-batch on a GPU, whose gradients are formed in the backward pass: three launches in all."""

    @staticmethod
    def forward(ctx: Any, real: Tensor, fake: Tensor, batch: Samples, options: Options, need: tuple[bool, bool]) -> Any:
        loss, *state = triton.few.forward(batch, options, need)
        if any(need):
            ctx.save_for_backward(batch.real, batch.fake, *state)
            ctx.options, ctx.need = options, need
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        real, fake, *state = ctx.saved_tensors
        found = triton.few.gradients(real, fake, ctx.options, ctx.need, triton.few.Forward(grad, *state), grad)
        return (*found, None, None, None)


def structure_loss(
    backend: str,
    batch: Samples,
    options: Options,
    *,
    queue: Samples | None = None,
    group: dist.ProcessGroup | None = None,
    shared: Shared | None = None,
) -> Tensor:
    """S by the fused `backend`; arguments as in sadm_kernels.structure_loss, which has checked them."""
    grad = torch.is_grad_enabled()
    need = (grad and batch.real.requires_grad, grad and batch.fake.requires_grad)
    if shared is None and (torch.compiler.is_compiling() or _traced(batch.real) or _traced(batch.fake)):
        past = (None,) * 4 if queue is None else queue
        name = "" if group is None else group.group_name
        return _structure_loss(*batch, *past, *options.operands(), backend, *need, name)[0]
    if backend == "triton" and queue is None and group is None and shared is None and triton.few.fits(batch, options):
        few: Tensor = _Few.apply(batch.real, batch.fake, batch.alike(), options, need)
        return few
    if shared is None and group is not None:
        shared = _send(batch, options, queue, backend, group)
    loss: Tensor = _Eager.apply(*batch, options, queue, backend, need, shared)
    return loss


def _traced(x: Tensor) -> bool:
    """Whether x stands for a tensor (fake, proxy, ...) instead of being one with memory behind it."""
    return type(x) is not Tensor and type(x) is not torch.nn.Parameter
