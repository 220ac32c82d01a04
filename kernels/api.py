"""The public structure loss: checks its arguments, then hands over to a backend."""

import copy
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sadm_kernels import ops, reference
from sadm_kernels.capabilities import choose, transformed
from sadm_kernels.checks import check_batch, check_features, check_group, check_options, check_queue, check_rows
from sadm_kernels.gathering import Shared, agreed_weight, send
from sadm_kernels.samples import Options, Queue, Samples


def relation_matrix(
    features: Tensor, *, relation: str = "euclidean", normalize: str = "unit", tau: float = 1.0
) -> Tensor:
    """R(F) of features [B, d], by the reference: the [B, B] matrix that S compares, for people to look at.

    Raises:
        ValueError: as `structure_loss`.
    """
    check_options(relation, "squared", normalize, tau, 1.0, "reference")
    check_rows("features", features)
    return reference.relation_matrix(features, relation=relation, normalize=normalize, tau=float(tau))


def share(
    real: Tensor,
    *,
    group: dist.ProcessGroup,
    weight: Tensor | None = None,
    labels: Tensor | None = None,
    queue: Queue | None = None,
    check: bool = True,
) -> Shared:
    """Start sending real features to the ranks of `group`, before the generated ones exist. Collective.

    Give the result to `structure_loss` in place of `real`; it holds the other arguments. What runs in between, a
    forward of the encoder for example, overlaps with the transfer.

    Args:
        real, weight, labels, queue: as in `structure_loss`.
        check: False skips the small collective that finds ranks that disagree (on a GPU the host waits for it), for
            callers whose ranks cannot disagree.

    Raises:
        ValueError: as `structure_loss`, or `weight` requires a gradient, which would be lost.
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
        real: features F of real samples, [B, d]; float16, bfloat16, float32 or float64. Or what `share` returned, which
            holds weight, labels, queue and group.
        fake: features G of the generated counterparts, [B, e], on the same device. Width and dtype are its own, as a
            student's beside a teacher's: only B x B matrices are compared.
        relation: r(a, b): "euclidean" distance, "cosine" similarity, or "gaussian" exp(-||a-b||^2 / (2 tau^2)).
        penalty: rho: "squared", "absolute", or "huber" with threshold `delta`.
        normalize: "unit" scales each feature row to length 1, "mean" divides distances by their (weighted) mean over
            the counted pairs of their own matrix, "none" leaves them. "cosine" ignores it.
        weight: w, [B], finite, non-negative, not all zero (over all ranks of `group`); None: ones.
        labels: integers [B]; only pairs of equal labels count. Without such a pair S = 0.
        tau, delta: positive numbers; they get no gradient.
        queue: samples of earlier batches (`Queue`), as wide as the batch: all ordered pairs with at least one sample of
            this batch are compared. With `group` it is the same on every rank.
        group: process group; each rank passes equally many rows of the batch and gets the S of the whole batch and the
            gradient of its own rows in it. Data parallelism that averages gradients over ranks (DDP, FSDP, DeepSpeed)
            then trains with 1 / ranks of that gradient: multiply S by `dist.get_world_size(group)`.
        impl: "auto" takes the fused kernel of the features' device, "native" (C++, CPU) or "triton" (CUDA), where
            `backends()` has it and it can do what is asked, else "reference". Only the reference has second
            derivatives, forward mode, torch.func transforms and a gradient for `weight`.

    Returns:
        0-d tensor: float64 if any features are float64, else float32 (accumulated in float32, outside autocast).
        Rows closer than about 1e-3 of their length (float32) count as equal: distance 0, no gradient.
        B = 0 or 1 gives 0. NaN in the features gives NaN.

    Raises:
        ValueError: an argument of the wrong name, type, shape, dtype, device or range; or ranks that disagree, on all.
        RuntimeError: `impl` is not available here.
    """
    check_options(relation, penalty, normalize, tau, delta, impl)
    options = Options(relation, penalty, normalize, float(tau), float(delta))
    shared: Shared | None = None
    if isinstance(real, Shared):
        for name, x in (("weight", weight), ("labels", labels), ("queue", queue), ("group", group)):
            if x is not None:
                raise ValueError(f"{name}: must be given to share(), not with what share() returned")
        _refuse_to_trace()
        shared = real
        batch, queue, group = Samples(shared.real, fake, shared.weight, shared.labels), shared.queue, shared.group
        check_features(*batch[:2])
    else:
        batch = Samples(real, fake, weight, labels)
        check_group(group)
        check_batch(batch, alone=group is None)
        queue = check_queue(queue, batch)
    if group is not None and transformed(*batch[:3]):
        raise ValueError(
            "group=: torch.func transforms and forward-mode AD cannot cross ranks; use impl='reference', group=None"
        )
    backend = choose(impl, batch, options)
    evaluate = reference.structure_loss if backend == "reference" else partial(ops.structure_loss, backend)
    return evaluate(batch, options, queue=queue, group=group, shared=shared)


def _refuse_to_trace() -> None:
    """RuntimeError while torch.compile traces; with fullgraph=False that part then runs uncompiled."""
    if torch.compiler.is_compiling():
        raise RuntimeError("share(): torch.compile cannot trace an unfinished transfer; pass group= to structure_loss")


class StructureLoss(nn.Module):
    """`structure_loss` as a module: options at construction, tensors at the call.

    copy and deepcopy share `group`. pickle refuses a module that has one: a process group belongs to its process.
    """

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
        """S of features [B, d] and [B, e]; `weight`, `labels` and `queue` as in `structure_loss`.

        What `share` returned brings its own group.
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
