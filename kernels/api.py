"""The public structure loss: checks its arguments, then hands over to a backend."""

import math
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sadm_kernels import native, ops, reference, triton
from sadm_kernels.gathering import Shared, send
from sadm_kernels.samples import Options, Queue, Samples, compute_dtype

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
IMPLEMENTATIONS = ("auto", "reference", "native", "triton")


def backends() -> dict[str, str]:
    """Every backend by name: "ok", or why it cannot be used here and what to do."""
    return {"reference": "ok", "native": native.why_missing(), "triton": triton.why_missing()}


def _status(name: str) -> str:
    """What `backends()` says of a fused backend, without asking the other one."""
    if name == "native":
        return native.why_missing()
    # A GPU cannot be asked while torch.compile traces, and compiled code for one needs Triton anyway.
    return "ok" if torch.compiler.is_compiling() else triton.why_missing()


def _backend(impl: str, real: Tensor, weight: Tensor | None) -> str:
    """The backend that runs; "auto" takes the fused one of the features' device where it can do what is asked."""
    device, trains_weight = real.device.type, weight is not None and weight.requires_grad
    fused = {"cpu": "native", "cuda": "triton"}.get(device)
    if impl == "auto":
        usable = fused is not None and not trains_weight and not (device == "cuda" and real.dtype == torch.float64)
        return fused if usable and fused is not None and _status(fused) == "ok" else "reference"
    if impl == "reference":
        return impl
    where = {"native": "cpu", "triton": "cuda"}[impl]
    if device != where:
        raise ValueError(f"impl={impl!r}: runs on {where}, but the features are on {device}; use impl='auto'")
    status = _status(impl)
    if status != "ok":
        raise RuntimeError(f"impl={impl!r}: {status}; or use impl='auto'")
    if trains_weight:
        raise ValueError(f"weight.requires_grad=True: impl={impl!r} has no gradient for it; use impl='reference'")
    if impl == "triton" and real.dtype == torch.float64:
        raise ValueError("real.dtype=torch.float64: impl='triton' has no float64; use impl='reference'")
    return impl


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(allowed)}")


def _check_options(relation: str, penalty: str, normalize: str, tau: float, delta: float, impl: str) -> None:
    _choice("relation", relation, reference.RELATIONS)
    _choice("penalty", penalty, reference.PENALTIES)
    _choice("normalize", normalize, reference.NORMALIZATIONS)
    _choice("impl", impl, IMPLEMENTATIONS)
    for name, value in (("tau", tau), ("delta", delta)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}={value}: must be a positive number")


def _check_features(real: Tensor, fake: Tensor, of: str = "") -> None:
    """Both [B, d] and alike; `of` goes before their names."""
    for name, x in ((f"{of}real", real), (f"{of}fake", fake)):
        if type(x).__name__ == "DTensor":
            raise ValueError(f"{name} is a DTensor: pass {name}.to_local() and the process group as group=")
        if x.dim() != 2:
            raise ValueError(f"{name}.shape={tuple(x.shape)}: must be [B, d], one feature row a sample")
        if x.dtype not in _FLOATS:
            raise ValueError(f"{name}.dtype={x.dtype}: must be float16, bfloat16, float32 or float64")
    for attribute in ("shape", "dtype", "device"):
        if getattr(real, attribute) != getattr(fake, attribute):
            raise ValueError(
                f"{of}real.{attribute}={getattr(real, attribute)} but"
                f" {of}fake.{attribute}={getattr(fake, attribute)}:"
                " row i of both belongs to sample i, so they must agree"
            )


def _check_rows(name: str, x: Tensor, features: Tensor) -> None:
    if x.shape != features.shape[:1]:
        raise ValueError(f"{name}.shape={tuple(x.shape)}: must be [{len(features)}], one entry a sample")
    if x.device != features.device:
        raise ValueError(f"{name}.device={x.device}: must be {features.device}, where the features are")


def _check_labels(name: str, labels: Tensor, features: Tensor) -> None:
    _check_rows(name, labels, features)
    if labels.dtype.is_floating_point or labels.dtype.is_complex:
        raise ValueError(f"{name}.dtype={labels.dtype}: must be an integer type")


def _check_weight(name: str, weight: Tensor, features: Tensor) -> bool:
    """Whether one of them is above 0; with a group it may be another rank's turn to have one."""
    _check_rows(name, weight, features)
    # On an accelerator the check would wait for the device; there a negative weight is the caller's promise.
    if weight.device.type != "cpu" or torch.compiler.is_compiling() or not len(weight):
        return True
    if bool((weight < 0).any()):
        raise ValueError(f"{name}: has {float(weight.min())}, must not be negative")
    return bool((weight != 0).any())


def _check_batch(real: Tensor, weight: Tensor | None, labels: Tensor | None, alone: bool) -> bool:
    """Whether this rank has a weight above 0; without other ranks (`alone`) it must have."""
    some_weight = weight is None or _check_weight("weight", weight, real)
    if weight is not None and not some_weight and alone:
        raise ValueError(f"weight: all {len(weight)} are zero, at least one must be positive")
    if labels is not None:
        _check_labels("labels", labels, real)
    return some_weight


def _check_queue(queue: Queue | None, real: Tensor, labels: Tensor | None) -> Queue | None:
    """The queue; None for one that is empty."""
    if queue is None:
        return None
    _check_features(queue.real, queue.fake, "queue.")
    if queue.real.shape[1] != real.shape[1]:
        raise ValueError(f"queue.real.shape={tuple(queue.real.shape)}: must be [q, {real.shape[1]}], as wide as real")
    if queue.real.device != real.device:
        raise ValueError(f"queue.real.device={queue.real.device}: must be {real.device}, where the features are")
    for name, x in queue._asdict().items():
        if x is not None and x.requires_grad:
            raise ValueError(f"queue.{name}.requires_grad=True: the past has no gradient; use queue.{name}.detach()")
    if queue.weight is not None:
        _check_weight("queue.weight", queue.weight, queue.real)
    if (queue.labels is None) != (labels is None):
        there, missing = ("queue.labels", "labels") if labels is None else ("labels", "queue.labels")
        raise ValueError(f"{missing}=None: must be given with {there}, or neither")
    if queue.labels is not None:
        _check_labels("queue.labels", queue.labels, queue.real)
    return queue if len(queue.real) else None


def _check_group(
    real: Tensor,
    labels: Tensor | None,
    weight: Tensor | None,
    some_weight: bool,
    queue: Queue | None,
    group: dist.ProcessGroup,
) -> Tensor | None:
    """The weight, of ones where only other ranks bring one.

    Raises on every rank if the ranks disagree; a collective of unequal parts would hang or give nonsense. What has been
    agreed on before is not remembered: a rank that has something new to ask would ask alone.
    """
    queued = 0 if queue is None else len(queue.real)
    given = (labels is not None, weight is not None, some_weight)
    mine = [*real.shape, _FLOATS.index(real.dtype), queued, *map(int, given)]
    own = torch.tensor(mine, device=real.device)
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own, group=group)
    shapes, dtypes, queues, with_labels, with_weight, with_some_weight = zip(
        *((tuple(p[:2]), str(_FLOATS[p[2]]), p[3], *map(bool, p[4:])) for p in (part.tolist() for part in parts)),
        strict=True,
    )
    for name, values in (
        ("real.shape", shapes),
        ("real.dtype", dtypes),
        ("rows of queue", queues),
        ("labels given", with_labels),
    ):
        if len(set(values)) > 1:
            raise ValueError(f"{name} on the ranks of group: {', '.join(map(str, values))}; must be the same on all")
    if not any(with_some_weight):
        raise ValueError("weight: all are zero on every rank of group, at least one must be positive")
    return real.new_ones(len(real), dtype=compute_dtype(real)) if weight is None and any(with_weight) else weight


def share(
    real: Tensor,
    *,
    group: dist.ProcessGroup,
    weight: Tensor | None = None,
    labels: Tensor | None = None,
    queue: Queue | None = None,
    check: bool = True,
) -> Shared:
    """Start sending real features to the ranks of `group`, before the generated ones are there. Collective.

    Hand the result to `structure_loss` in the place of `real`; the other arguments are in it. What comes in between
    runs while the features travel: a forward of the encoder, say.

    Args:
        real, weight, labels, queue: as in `structure_loss`.
        check: False leaves out the small collective by which ranks that disagree are found (and, on a GPU, the wait
            for it), for callers whose ranks cannot disagree.

    Raises:
        ValueError: as `structure_loss`; or `weight` requires a gradient, which would be lost.
    """
    _check_features(real, real)
    if weight is not None and weight.requires_grad:
        raise ValueError("weight.requires_grad=True: share() sends values alone; give it to structure_loss")
    some_weight = _check_batch(real, weight, labels, alone=False)
    queue = _check_queue(queue, real, labels)
    if check:
        weight = _check_group(real, labels, weight, some_weight, queue, group)
    return send(real, weight, labels, queue, group)


def structure_loss(
    real: Tensor | Shared,
    fake: Tensor,
    *,
    relation: str = "euclidean",
    penalty: str = "squared",
    normalize: str = "unit",
    weight: Tensor | None = None,
    labels: Tensor | None = None,
    tau: float = 1.0,
    delta: float = 1.0,
    queue: Queue | None = None,
    group: dist.ProcessGroup | None = None,
    impl: str = "auto",
) -> Tensor:
    """The structural distance S between the pairwise relations of real and generated features.

    S = sum_{i != j} w_i w_j rho(R(G)_ij - R(F)_ij) / sum_{i != j} w_i w_j; SADM (arXiv 2402.17563).

    Args:
        real: features F of real samples, [B, d]; float16, bfloat16, float32 or float64. Or what `share` made of them,
            with weight, labels, queue and group.
        fake: features G of the generated counterparts, same shape, dtype and device.
        relation: r(a, b): "euclidean" distance, "cosine" similarity, or "gaussian" exp(-||a-b||^2 / (2 tau^2)).
        penalty: rho: "squared", "absolute", or "huber" with threshold `delta`.
        normalize: "unit" scales each feature row to length 1, "mean" divides distances by their (weighted) mean
            over the counted pairs of their own matrix, "none" leaves them. Cosine needs none and ignores it.
        weight: w, [B], non-negative, not all zero (over all ranks of `group`); None counts every sample alike.
        labels: integers [B]; only pairs of one label count. No such pair: S = 0.
        queue: samples of earlier batches as extra columns (`Queue`): all ordered pairs with at least one sample of
            this batch are compared. With `group` the same on every rank.
        group: process group; each rank passes its share of the batch (equal sizes: checked by a small collective),
            gets the S of the whole batch and the gradient of its own rows as one process with the whole batch would
            compute it.
        impl: "auto" takes the fused kernel of the features' device, "native" (C++, CPU) or "triton" (CUDA), where
            `backends()` has it, else "reference". Only the reference can be differentiated twice or has a gradient
            for `weight` (there "auto" takes it).

    Returns:
        0-d tensor: float64 for float64 input, else float32 (accumulated in float32, outside autocast).
        Rows closer than about 1e-3 of their length (float32) count as equal: distance 0, no gradient.
        B = 0 or 1 gives 0. A NaN in the input gives NaN.

    Raises:
        ValueError: an argument of the wrong name, shape, dtype, device or range.
        RuntimeError: an implementation that is not available here.
    """
    _check_options(relation, penalty, normalize, tau, delta, impl)
    shared: Shared | None = None
    if isinstance(real, Shared):
        for name, x in (("weight", weight), ("labels", labels), ("queue", queue), ("group", group)):
            if x is not None:
                raise ValueError(f"{name}: was to be given to share(), not again with what it returned")
        shared = real
        real, weight, labels, queue, group = shared.real, shared.weight, shared.labels, shared.queue, shared.group
        _check_features(real, fake)
    else:
        _check_features(real, fake)
        some_weight = _check_batch(real, weight, labels, alone=group is None)
        queue = _check_queue(queue, real, labels)
    backend = _backend(impl, real, weight)
    if group is not None and shared is None:
        weight = _check_group(real, labels, weight, some_weight, queue, group)
    evaluate = reference.structure_loss if backend == "reference" else partial(ops.structure_loss, backend)
    batch, options = (
        Samples(real, fake, weight, labels),
        Options(relation, penalty, normalize, float(tau), float(delta)),
    )
    return evaluate(batch, options, queue=queue, group=group, shared=shared)


class StructureLoss(nn.Module):
    """`structure_loss` as a module: options at construction, tensors at the call."""

    def __init__(
        self,
        *,
        relation: str = "euclidean",
        penalty: str = "squared",
        normalize: str = "unit",
        tau: float = 1.0,
        delta: float = 1.0,
        group: dist.ProcessGroup | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        _check_options(relation, penalty, normalize, tau, delta, impl)
        self.relation, self.penalty, self.normalize = relation, penalty, normalize
        self.tau, self.delta, self.group, self.impl = tau, delta, group, impl

    def forward(
        self,
        real: Tensor | Shared,
        fake: Tensor,
        weight: Tensor | None = None,
        labels: Tensor | None = None,
        queue: Queue | None = None,
    ) -> Tensor:
        """S of features [B, d] and [B, d]; `weight`, `labels` and `queue` as in `structure_loss`.

        What `share` returned comes with a group of its own.
        """
        return structure_loss(
            real,
            fake,
            relation=self.relation,
            penalty=self.penalty,
            normalize=self.normalize,
            weight=weight,
            labels=labels,
            tau=self.tau,
            delta=self.delta,
            queue=queue,
            group=None if isinstance(real, Shared) else self.group,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        return f"relation={self.relation}, penalty={self.penalty}, normalize={self.normalize}, impl={self.impl}"
