"""The public structure loss: checks its arguments, then hands over to a backend."""

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sadm_kernels import reference

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
IMPLEMENTATIONS = ("auto", "reference", "native", "triton")
_NOT_BUILT = "this version has the reference implementation only"


def backends() -> dict[str, str]:
    """Every backend by name: "ok", or why it cannot be used here."""
    return {"reference": "ok", "native": _NOT_BUILT, "triton": _NOT_BUILT}


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


def _check_group(real: Tensor, labels: Tensor | None, some_weight: bool, group: dist.ProcessGroup) -> None:
    """Raise on every rank if the ranks disagree; a collective of unequal parts would hang or give nonsense."""
    mine = [*real.shape, _FLOATS.index(real.dtype), int(labels is not None), int(some_weight)]
    own = torch.tensor(mine, device=real.device)
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own, group=group)
    shapes, dtypes, with_labels, with_weight = zip(
        *((tuple(p[:2]), str(_FLOATS[p[2]]), bool(p[3]), bool(p[4])) for p in (part.tolist() for part in parts)),
        strict=True,
    )
    for name, values in (("real.shape", shapes), ("real.dtype", dtypes), ("labels given", with_labels)):
        if len(set(values)) > 1:
            raise ValueError(f"{name} on the ranks of group: {', '.join(map(str, values))}; must be the same on all")
    if not any(with_weight):
        raise ValueError("weight: all are zero on every rank of group, at least one must be positive")


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
        impl: "auto", "reference", "native" or "triton"; see `backends()`.

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
    if impl in ("native", "triton"):
        raise RuntimeError(f"impl={impl!r}: {backends()[impl]}; use impl='auto'")
    if group is not None:
        _check_group(real, labels, some_weight, group)
    return reference.structure_loss(
        real,
        fake,
        relation=relation,
        penalty=penalty,
        normalize=normalize,
        weight=weight,
        labels=labels,
        tau=tau,
        delta=delta,
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
