"""Scores of two sets of features beside the Frechet distance: KID, precision and recall; and of one set of class
probabilities: the inception score. Everything in float64.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sadm_fast.counters import permutation

NEIGHBOURS = 3  # of precision and recall, as in published figures
SPLITS = 10  # of the inception score, as in published figures
_SUBSET = int(1e3)  # rows of KID's subsets, as in published figures
_ROWS = 1024  # of a block of distances: limits memory, changes no number


class Spread(NamedTuple):
    """A mean over subsets or splits, and their standard deviation."""

    mean: float
    std: float


def squared_mmd(x: Tensor, y: Tensor) -> float:
    """The unbiased squared maximum mean discrepancy of features [m, d] and [n, d], with KID's kernel (x.y / d + 1)^3.

    It may be negative. ValueError for fewer than two rows. Source: Gretton et al. 2012, eq. 3; Binkowski et al.,
    "Demystifying MMD GANs", ICLR 2018, section 4.
    """
    _check(x, y)
    x, y = x.double(), y.double()
    (m, d), n = x.shape, len(y)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / d + 1.0) ** 3

    of_x, of_y = kernel(x, x), kernel(y, y)
    inside = (of_x.sum() - of_x.trace()) / (m * (m - 1)) + (of_y.sum() - of_y.trace()) / (n * (n - 1))
    return float(inside - 2.0 * kernel(x, y).mean())


def kernel_distance(
    generated: Tensor, real: Tensor, *, subsets: int = 100, size: int = _SUBSET, seed: int = 0
) -> Spread:
    """KID: `squared_mmd` of random subsets of features [m, d] and [n, d], mean and deviation over the subsets.

    Subsets of `size` rows, or of all where there are fewer, without repetition, as functions of the seed.
    """
    _check(generated, real)
    size = min(size, len(generated), len(real))
    found = []
    for subset in range(subsets):
        rows = [permutation(seed, 2 * subset + side, len(of))[:size] for side, of in enumerate((generated, real))]
        found.append(squared_mmd(generated[rows[0].to(generated.device)], real[rows[1].to(real.device)]))
    values = torch.tensor(found, dtype=torch.float64)
    return Spread(float(values.mean()), float(values.std(correction=0)))


def inception_score(probabilities: Tensor, splits: int = SPLITS) -> Spread:
    """exp of the mean KL divergence of p(y | x) [n, classes] from their mean, in `splits` parts in their order.

    Part i has rows i n / splits, rounded down, to (i + 1) n / splits. ValueError for fewer rows than splits, and for
    what are no probabilities. Source: Salimans et al. 2016, "Improved Techniques for Training GANs".
    """
    if len(probabilities) < splits:
        raise ValueError(f"an inception score in {splits} splits needs as many samples, got {len(probabilities)}")
    if not bool(((probabilities >= 0) & (probabilities <= 1)).all()):
        raise ValueError("the class probabilities hold NaN: so do the images, or the judge's weights")
    found = []
    edges = [i * len(probabilities) // splits for i in range(1, splits)]
    for part in probabilities.double().tensor_split(edges):
        mean = part.mean(dim=0, keepdim=True)
        # 0 log 0 is 0
        divergence = torch.special.xlogy(part, part) - torch.special.xlogy(part, mean)
        found.append(divergence.sum(dim=1).mean().exp())
    values = torch.stack(found)
    return Spread(float(values.mean()), float(values.std(correction=0)))


class PrecisionRecall(NamedTuple):
    precision: float  # share of generated samples inside the real ones' manifold
    recall: float  # share of real samples inside the generated ones' manifold


def precision_recall(generated: Tensor, real: Tensor, neighbours: int = NEIGHBOURS) -> PrecisionRecall:
    """Improved precision and recall of features [m, d] and [n, d].

    A set's manifold is the union of balls around its points, each as large as the distance to the point's k-th
    neighbour in the set. ValueError for sets of k points or fewer. Source: Kynkaanniemi et al. 2019, eq. 1 to 3.
    """
    _check(generated, real)
    for of in (generated, real):
        if len(of) <= neighbours:
            raise ValueError(f"{len(of)} samples: the manifold of {neighbours} neighbours needs more")
    generated, real = generated.double(), real.double()
    return PrecisionRecall(
        precision=_share_inside(generated, real, neighbours), recall=_share_inside(real, generated, neighbours)
    )


def _share_inside(points: Tensor, of: Tensor, neighbours: int) -> float:
    """The share of points [m, d] inside the manifold of `of` [n, d]."""
    radii = torch.cat([_distances(part, of).kthvalue(neighbours + 1, dim=1).values for part in of.split(_ROWS)])
    inside = [(_distances(part, of) <= radii).any(dim=1) for part in points.split(_ROWS)]
    return float(torch.cat(inside).double().mean())


def _distances(x: Tensor, y: Tensor) -> Tensor:
    # Not by products: a point's distance to itself must be 0.
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def _check(x: Tensor, y: Tensor) -> None:
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"features of shape {tuple(x.shape)} and {tuple(y.shape)}: expected [m, d] and [n, d]")
    if min(len(x), len(y)) < 2:
        raise ValueError(f"{len(x)} and {len(y)} samples: at least 2 of each are needed")
    if not (bool(x.isfinite().all()) and bool(y.isfinite().all())):
        raise ValueError("the features hold NaN or infinite values: so do the images, or the judge's weights")
