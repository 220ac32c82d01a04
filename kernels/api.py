"""The public structure loss: checks its arguments, then hands over to a backend."""

import math
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sadm_kernels import native, ops, reference, triton

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


def _check_features(real: Tensor, fake: Tensor) -> None:
    for name, x in (("real", real), ("fake", fake)):
        if type(x).__name__ == "DTensor":
            raise ValueError(f"{name} is a DTensor: pass {name}.to_local() and the process group as group=")
        if x.dim() != 2:
            raise ValueError(f"{name}.shape={tuple(x.shape)}: must be [B, d], one feature row a sample")
        if x.dtype not in _FLOATS:
            raise ValueError(f"{name}.dtype={x.dtype}: must be float16, bfloat16, float32 or float64")
    for attribute in ("shape", "dtype", "device"):
        if getattr(real, attribute) != getattr(fake, attribute):
            raise ValueError(
                f"real.{attribute}={getattr(real, attribute)} but fake.{attribute}={getattr(fake, attribute)}:"
                " row i of both belongs to sample i, so they must agree"
            )


def _check_rows(name: str, x: Tensor, real: Tensor) -> None:
    if x.shape != real.shape[:1]:
        raise ValueError(f"{name}.shape={tuple(x.shape)}: must be [{len(real)}], one entry a sample")
    if x.device != real.device:
        raise ValueError(f"{name}.device={x.device}: must be {real.device}, where the features are")


def _check_weight(weight: Tensor, group: dist.ProcessGroup | None) -> bool:
    """Whether this rank has a weight above 0; with a group it may be another rank's turn to have one."""
    # On an accelerator the check would wait for the device; there a negative weight is the caller's promise.
    if weight.device.type != "cpu" or torch.compiler.is_compiling() or not len(weight):
        return True
    if bool((weight < 0).any()):
        raise ValueError(f"weight: has {float(weight.min())}, must not be negative")
    some = bool((weight != 0).any())
    if not some and group is None:
        raise ValueError(f"weight: all {len(weight)} are zero, at least one must be positive")
    return some


def _check_group(
    real: Tensor, labels: Tensor | None, weight: Tensor | None, some_weight: bool, group: dist.ProcessGroup
) -> Tensor | None:
    """The weight, of ones where only other ranks bring one.

    Raises on every rank if the ranks disagree; a collective of unequal parts would hang or give nonsense.
    """
    given = (labels is not None, weight is not None, some_weight)
    mine = [*real.shape, _FLOATS.index(real.dtype), *map(int, given)]
    own = torch.tensor(mine, device=real.device)
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own, group=group)
    shapes, dtypes, with_labels, with_weight, with_some_weight = zip(
        *((tuple(p[:2]), str(_FLOATS[p[2]]), *map(bool, p[3:])) for p in (part.tolist() for part in parts)),
        strict=True,
    )
    for name, values in (("real.shape", shapes), ("real.dtype", dtypes), ("labels given", with_labels)):
        if len(set(values)) > 1:
            raise ValueError(f"{name} on the ranks of group: {', '.join(map(str, values))}; must be the same on all")
    if not any(with_some_weight):
        raise ValueError("weight: all are zero on every rank of group, at least one must be positive")
    return real.new_ones(len(real)) if weight is None and any(with_weight) else weight


def structure_loss(
    real: Tensor,
    fake: Tensor,
    *,
    relation: str = "euclidean",
    penalty: str = "squared",
    normalize: str = "unit",
    weight: Tensor | None = None,
    labels: Tensor | None = None,
    tau: float = 1.0,
    delta: float = 1.0,
    group: dist.ProcessGroup | None = None,
    impl: str = "auto",
) -> Tensor:
    """The structural distance S between the pairwise relations of real and generated features.

    S = sum_{i != j} w_i w_j rho(R(G)_ij - R(F)_ij) / sum_{i != j} w_i w_j; SADM (arXiv 2402.17563).

    Args:
        real: features F of real samples, [B, d]; float16, bfloat16, float32 or float64.
        fake: features G of the generated counterparts, same shape, dtype and device.
        relation: r(a, b): "euclidean" distance, "cosine" similarity, or "gaussian" exp(-||a-b||^2 / (2 tau^2)).
        penalty: rho: "squared", "absolute", or "huber" with threshold `delta`.
        normalize: "unit" scales each feature row to length 1, "mean" divides distances by their (weighted) mean
            over the counted pairs of their own matrix, "none" leaves them. Cosine needs none and ignores it.
        weight: w, [B], non-negative, not all zero (over all ranks of `group`); None counts every sample alike.
        labels: integers [B]; only pairs of one label count. No such pair: S = 0.
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
    _check_features(real, fake)
    some_weight = True
    if weight is not None:
        _check_rows("weight", weight, real)
        some_weight = _check_weight(weight, group)
    if labels is not None:
        _check_rows("labels", labels, real)
        if labels.dtype.is_floating_point or labels.dtype.is_complex:
            raise ValueError(f"labels.dtype={labels.dtype}: must be an integer type")
    backend = _backend(impl, real, weight)
    if group is not None:
        weight = _check_group(real, labels, weight, some_weight, group)
    evaluate = reference.structure_loss if backend == "reference" else partial(ops.structure_loss, backend)
    return evaluate(
        real,
        fake,
        weight=weight,
        labels=labels,
        relation=relation,
        penalty=penalty,
        normalize=normalize,
        tau=float(tau),
        delta=float(delta),
        group=group,
    )


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

    def forward(self, real: Tensor, fake: Tensor, weight: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """S of features [B, d] and [B, d]; `weight` and `labels` as in `structure_loss`."""
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
            group=self.group,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        return f"relation={self.relation}, penalty={self.penalty}, normalize={self.normalize}, impl={self.impl}"
