"""The public structure loss: checks its arguments, then hands over to a backend."""

import copy
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sadm_kernels import ops, reference
from sadm_kernels.capabilities import choose, transformed
from sadm_kernels.checks import check_batch, check_features, check_group, check_options, check_queue
from sadm_kernels.gathering import Shared, agreed_weight, send
from sadm_kernels.samples import Options, Queue, Samples


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
    _refuse_to_trace()
    batch = Samples(real, real, weight, labels)
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"group: must be a torch.distributed.ProcessGroup, not {type(group).__name__}")
    check_batch(batch, alone=False)
    if weight is not None and weight.requires_grad:
        raise ValueError("weight.requires_grad=True: share() sends values alone; give it to structure_loss")
    queue = check_queue(queue, batch)
    if check:
        weight = agreed_weight(batch, 0 if queue is None else len(queue.real), group, {})
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
    check_options(relation, penalty, normalize, tau, delta, impl)
    options = Options(relation, penalty, normalize, float(tau), float(delta))
    shared: Shared | None = None
    if isinstance(real, Shared):
        for name, x in (("weight", weight), ("labels", labels), ("queue", queue), ("group", group)):
            if x is not None:
                raise ValueError(f"{name}: was to be given to share(), not again with what it returned")
        _refuse_to_trace()
        shared = real
        batch, queue, group = Samples(shared.real, fake, shared.weight, shared.labels), shared.queue, shared.group
        check_features(*batch[:2])
    else:
        batch = Samples(real, fake, weight, labels)
        check_group(group)
        check_batch(batch, alone=group is None)
        queue = check_queue(queue, batch)
    if group is not None and any(transformed(x) for x in batch[:3]):
        raise ValueError(
            "group=: torch.func transforms and forward-mode AD cannot cross ranks; use impl='reference', group=None"
        )
    backend = choose(impl, batch, options)
    evaluate = reference.structure_loss if backend == "reference" else partial(ops.structure_loss, backend)
    return evaluate(batch, options, queue=queue, group=group, shared=shared)


def _refuse_to_trace() -> None:
    """RuntimeError under torch.compile; with fullgraph=False it runs that part uncompiled instead."""
    if torch.compiler.is_compiling():
        raise RuntimeError("share(): torch.compile cannot trace rows that are on their way; use structure_loss(group=)")


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
        check_options(relation, penalty, normalize, tau, delta, impl)
        check_group(group)
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

    def __copy__(self) -> "StructureLoss":
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> "StructureLoss":
        """A copy that shares the process group, of which a process has only one."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        memo[id(self.group)] = self.group
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        if self.group is not None:
            raise TypeError(
                "StructureLoss(group=...): a process group cannot be pickled; set .group = None to save it, and the"
                " group again where it is loaded"
            )
        return self.__dict__
