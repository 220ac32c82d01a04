"""The structure loss, by definition: plain PyTorch, any float dtype, twice differentiable.

    S = sum_{i != j} w_i w_j rho(R(G)_ij - R(F)_ij) / sum_{i != j} w_i w_j

F are the features of real samples, G those of generated ones, R(F)_ij = r(f_i, f_j) the relation matrix. SADM
(arXiv 2402.17563) gives the game over S; relation, penalty, normalisation and weights are this project's choices.
Other backends are tested against this file.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor

from sadm_kernels.collectives import agree, gather, sum_ranks
from sadm_kernels.gathering import Shared
from sadm_kernels.samples import Options, Samples, compute_dtype

RELATIONS = ("euclidean", "cosine", "gaussian")
PENALTIES = ("squared", "absolute", "huber")
NORMALIZATIONS = ("unit", "mean", "none")

# ||a||^2 + ||b||^2 - 2ab cancels: its rounding noise, in units of eps * (||a||^2 + ||b||^2), stays below this.
_MERGE_EPS = 8.0


def _unit_rows(x: Tensor) -> Tensor:
    """Rows scaled to length 1; a row of zeros stays zero and gets no gradient."""
    squared = x.square().sum(dim=1, keepdim=True)
    zero = squared == 0
    return torch.where(zero, torch.zeros_like(x), x * torch.where(zero, 1.0, squared).rsqrt())


def _squared_distances(rows: Tensor, columns: Tensor) -> Tensor:
    """||a_i - b_j||^2: [B, d], [C, d] -> [B, C]; pairs closer than the rounding noise are 0 without gradient."""
    nr, nc = rows.square().sum(1)[:, None], columns.square().sum(1)[None, :]
    d2 = nr + nc - 2.0 * rows @ columns.T
    noise = _MERGE_EPS * torch.finfo(rows.dtype).eps * (nr + nc).detach()
    return torch.where(d2 <= noise, torch.zeros_like(d2), d2)  # NaN compares false and stays NaN


def _sqrt(x: Tensor) -> Tensor:
    """Square root whose gradient at 0 is 0."""
    zero = x == 0
    return torch.where(zero, torch.zeros_like(x), torch.where(zero, 1.0, x).sqrt())


def _relation(
    rows: Tensor,
    columns: Tensor,
    pair_weight: Tensor,
    *,
    relation: str,
    normalize: str,
    tau: float,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """R_ij = r(a_i, b_j): [B, d], [C, d] -> [B, C]. `pair_weight` [B, C] says which pairs make the mean distance."""
    if relation == "cosine" or normalize == "unit":
        rows, columns = _unit_rows(rows), _unit_rows(columns)
    if relation == "cosine":
        return rows @ columns.T
    d2 = _squared_distances(rows, columns)
    if normalize == "mean":
        distance = _sqrt(d2)
        sums = torch.stack([(pair_weight * distance).sum(), pair_weight.sum()])
        if group is not None:
            sums = sum_ranks(sums, group.group_name, True)
        mean = sums[0] / torch.where(sums[1] == 0, 1.0, sums[1])
        scale = 1.0 / torch.where(mean == 0, 1.0, mean)
        return distance * scale if relation == "euclidean" else torch.exp(-d2 * scale.square() / (2.0 * tau**2))
    return _sqrt(d2) if relation == "euclidean" else torch.exp(-d2 / (2.0 * tau**2))


def _penalty(x: Tensor, penalty: str, delta: float) -> Tensor:
    if penalty == "squared":
        return x.square()
    if penalty == "absolute":
        return x.abs()
    limit = x.new_ones(()) * delta  # a tensor, or torch.compile would compile again for each value
    return torch.where(x.abs() <= limit, 0.5 * x.square(), limit * (x.abs() - 0.5 * limit))


def _no_autocast(device_type: str) -> AbstractContextManager[object]:
    """Relations in bf16 would lose their small differences; devices without autocast (meta) need nothing."""
    if torch.compiler.is_compiling():  # torch 2.11 cannot trace is_autocast_available
        available = device_type != "meta"
    else:
        available = torch.amp.is_autocast_available(device_type)
    if available:
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def relation_matrix(
    features: Tensor, *, relation: str = "euclidean", normalize: str = "unit", tau: float = 1.0
) -> Tensor:
    """R(F) of features [B, d]: the B x B matrix that the discriminator compares, for people to look at."""
    x = features.to(compute_dtype(features))
    pairs = 1.0 - torch.eye(len(x), dtype=x.dtype, device=x.device)
    return _relation(x, x, pairs, relation=relation, normalize=normalize, tau=tau, group=None)


def structure_loss(
    batch: Samples,
    options: Options,
    *,
    queue: Samples | None = None,
    group: dist.ProcessGroup | None = None,
    shared: Shared | None = None,
) -> Tensor:
    """S of real and fake features [B, d] (0-d float32, float64 for float64 input); see sadm_kernels.structure_loss.

    With `group`, B is this rank's share: local rows are compared with the columns of all ranks, every rank returns
    the S of the whole batch, and the gradient of its rows is the gradient one process with the whole batch would get.
    `shared`: what has been sent already, and need not be again.
    """
    real, fake, weight, labels = batch
    relation, penalty, normalize, tau, delta = options
    dtype = compute_dtype(real, fake)
    if group is not None and shared is None:
        queued = 0 if queue is None else len(queue.real)
        weight = agree(real, fake, weight, labels, queued, *options.operands(), group.group_name)
    with _no_autocast(real.device.type):
        f, g = real.to(dtype), fake.to(dtype)
        w = torch.ones(len(f), dtype=dtype, device=f.device) if weight is None else weight
        labels = None if labels is None else labels.long()
        columns, first = Samples(f, g, w, labels), 0
        if group is not None:
            columns, first = _of_all_ranks(columns, group, shared), dist.get_rank(group) * len(f)
        now = len(columns.real)
        if queue is not None:
            columns = columns.followed_by(queue)
        assert columns.weight is not None
        w = columns.weight.to(dtype)
        # A queue's pairs count both ways, (i, k) and (k, i), and only one of them is here.
        ways = torch.ones_like(w)
        ways[now:] = 2.0

        pair_weight = w[first : first + len(f), None] * (ways * w)[None, :]
        if labels is not None and columns.labels is not None:
            pair_weight = pair_weight * (labels[:, None] == columns.labels[None, :])
        own = torch.arange(len(f), device=f.device)
        pair_weight = pair_weight.index_put((own, own + first), pair_weight.new_zeros(()))

        def matrix(rows: Tensor, columns: Tensor) -> Tensor:
            return _relation(rows, columns, pair_weight, relation=relation, normalize=normalize, tau=tau, group=group)

        difference = matrix(g, columns.fake) - matrix(f, columns.real)
        sums = torch.stack([(pair_weight * _penalty(difference, penalty, delta)).sum(), pair_weight.sum()])
        if group is not None:
            sums = sum_ranks(sums, group.group_name, False)
        return sums[0] / torch.where(sums[1] == 0, 1.0, sums[1])


def _of_all_ranks(own: Samples, group: dist.ProcessGroup, shared: Shared | None) -> Samples:
    """The batch of all ranks; what is in `shared` need not travel again, unless a gradient has to travel back."""
    name = group.group_name
    if shared is None:
        assert own.weight is not None
        real, weight = gather(own.real, name), gather(own.weight, name)
        labels = None if own.labels is None else gather(own.labels, name)
    else:
        real, weight, labels = shared.wait()
        real = gather(own.real, name) if own.real.requires_grad else real.to(own.real.dtype)
        weight = real.new_ones(len(real)) if weight is None else weight
    return Samples(real, gather(own.fake, name), weight, labels)
