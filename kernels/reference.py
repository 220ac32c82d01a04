"""The structure loss, by definition: plain PyTorch, any float dtype, twice differentiable.

    S = sum_{i != j} w_i w_j rho(R(G)_ij - R(F)_ij) / sum_{i != j} w_i w_j

F are the features of real samples, G those of generated ones, R(F)_ij = r(f_i, f_j) the relation matrix. SADM
(arXiv 2402.17563) gives the game over S; relation, penalty, normalisation and weights are this project's choices.
Other backends are tested against this file.

Distances come from ||a||^2 + ||b||^2 - 2ab, which cancels where rows are long beside their differences. So rows are
scaled by a power of two and their mean is subtracted first: neither changes what is computed, both keep its digits.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor

from sadm_kernels.collectives import agree, gather, sum_ranks
from sadm_kernels.gathering import Shared
from sadm_kernels.samples import Options, Samples, compute_dtype
from sadm_kernels.scaling import common_scale, power_of_two, row_scale, share_of_weight

RELATIONS = ("euclidean", "cosine", "gaussian")
PENALTIES = ("squared", "absolute", "huber")
NORMALIZATIONS = ("unit", "mean", "none")

# The rounding noise of ||a||^2 + ||b||^2 - 2ab stays below the first number times eps * (||a||^2 + ||b||^2); the square
# of the distance that rounding puts between unit rows of one direction, below the second number times eps^2.
_MERGE_EPS, _MERGE_UNIT = 8.0, 16.0


def _unit_rows(x: Tensor) -> Tensor:
    """Rows scaled to length 1; a row of zeros stays zero and gets no gradient."""
    x = x / row_scale(x)  # squares of what is left stay within the range of a float
    squared = x.square().sum(dim=1, keepdim=True)
    zero = squared == 0
    return torch.where(zero, torch.zeros_like(x), x * torch.where(zero, 1.0, squared).rsqrt())


def _squared_distances(rows: Tensor, columns: Tensor) -> Tensor:
    """||a_i - b_j||^2: [B, d], [C, d] -> [B, C], of rows near the origin; rounding may make it negative."""
    return rows.square().sum(1)[:, None] + columns.square().sum(1)[None, :] - 2.0 * rows @ columns.T


def _merged(d2: Tensor, rows: Tensor, columns: Tensor, floor: float) -> Tensor:
    """`d2` with pairs closer than its rounding noise at distance 0, without gradient."""
    squares = rows.detach().square().sum(1)[:, None] + columns.detach().square().sum(1)[None, :]
    noise = _MERGE_EPS * torch.finfo(rows.dtype).eps * squares + floor
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
    """R_ij = r(a_i, b_j): [B, d], [C, d] -> [B, C]; cosines less 1, which no difference of two relations notices.

    `pair_weight` [B, C] says which pairs make the mean distance.
    """
    unit = relation == "cosine" or normalize == "unit"
    # Half of the exponent is left in the rows: gradients are multiplied by `scale` before they are divided by it.
    scale = columns.new_ones(()) if unit else power_of_two(common_scale(columns).sqrt())
    rows, columns = (_unit_rows(x) if unit else x / scale for x in (rows, columns))
    nonzero = [(x.detach() != 0).any(1).to(x.dtype) for x in (rows, columns)]
    centre = columns.detach().sum(0) / max(len(columns), 1)
    rows, columns = rows - centre, columns - centre
    d2 = _squared_distances(rows, columns)
    if relation == "cosine":  # (|a|^2 + |b|^2 - ||a - b||^2) / 2, of which little is left where rows point one way
        return (nonzero[0][:, None] + nonzero[1][None, :] - 2.0 - d2) / 2.0
    d2 = _merged(d2, rows, columns, _MERGE_UNIT * torch.finfo(d2.dtype).eps ** 2 if unit else 0.0)
    if normalize == "mean":
        sums = torch.stack([(pair_weight * _sqrt(d2)).sum(), pair_weight.sum()])
        if group is not None:
            sums = sum_ranks(sums, group.group_name, True)
        mean = sums[0] / _or_one(sums[1])
        scale = 1.0 / torch.where(mean == 0, 1.0, mean)  # in place of the power of two, which is a part of the mean
    if relation == "euclidean":
        return _sqrt(d2) * scale
    return torch.exp(-(d2 * scale * scale) / (2.0 * tau**2))


def _or_one(total: Tensor) -> Tensor:
    """The sum of pair weights; 1 where no pair counts. Its inverse must be finite."""
    return torch.where(total < torch.finfo(torch.float32).tiny, 1.0, total)


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
    matrix = _relation(x, x, pairs, relation=relation, normalize=normalize, tau=tau, group=None)
    return matrix + 1.0 if relation == "cosine" else matrix


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
        w = share_of_weight(columns.weight, dtype)
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
        return sums[0] / _or_one(sums[1])


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
