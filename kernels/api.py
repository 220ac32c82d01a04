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
        weight: w, [B], non-negative, not all zero; None counts every sample alike.
        labels: integers [B]; only pairs of one label count. No such pair: S = 0.
        group: process group; each rank passes its share of the batch (equal sizes), gets the S of the whole batch
            and the gradient of its own rows as one process with the whole batch would compute it.
        impl: "auto", "reference", "native" or "triton"; see `backends()`.

    Returns:
        0-d tensor: float64 for float64 input, else float32 (accumulated in float32, outside autocast).
        Rows closer than about 1e-3 of their length (float32) count as equal: distance 0, no gradient.
        B = 0 or 1 gives 0. A NaN in the input gives NaN.

    Raises:
        ValueError: an argument of the wrong name, shape, dtype, device or range.
        RuntimeError: an implementation that is not available here.
    """
    _choice("relation", relation, reference.RELATIONS)
    _choice("penalty", penalty, reference.PENALTIES)
    _choice("normalize", normalize, reference.NORMALIZATIONS)
    _choice("impl", impl, IMPLEMENTATIONS)
    _check_features(real, fake)
    for name, value in (("tau", tau), ("delta", delta)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}={value}: must be a positive number")
    if weight is not None:
        _check_rows("weight", weight, real)
        # On an accelerator the check would wait for the device; there a negative weight is the caller's promise.
        if weight.device.type == "cpu" and not torch.compiler.is_compiling() and len(weight):
            if bool((weight < 0).any()) or not bool((weight != 0).any()):
                raise ValueError("weight: must be non-negative and not all zero")
    if labels is not None:
        _check_rows("labels", labels, real)
        if labels.dtype.is_floating_point or labels.dtype.is_complex:
            raise ValueError(f"labels.dtype={labels.dtype}: must be an integer type")
    if impl in ("native", "triton"):
        raise RuntimeError(f"impl={impl!r}: {backends()[impl]}; use impl='auto'")
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
        _choice("relation", relation, reference.RELATIONS)
        _choice("penalty", penalty, reference.PENALTIES)
        _choice("normalize", normalize, reference.NORMALIZATIONS)
        _choice("impl", impl, IMPLEMENTATIONS)
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
