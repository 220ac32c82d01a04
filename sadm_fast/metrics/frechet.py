"""Frechet distance between two Gaussians, and the running statistics that give their moments.

D. C. Dowson and B. V. Landau, "The Frechet distance between multivariate normal distributions", Journal of
Multivariate Analysis 12 (1982); as a distance between sets of images in a feature space: M. Heusel et al.,
"GANs trained by a two time-scale update rule converge to a local Nash equilibrium", NeurIPS 2017.
"""

import torch
from torch import Tensor

from sadm_fast.ranks.collectives import sum_over_ranks


class FeatureStatistics:
    """Number, sum and sum of outer products of feature vectors, in float64.

    Raw sums, so that batches and ranks add up in any order. Subtracting the mean in `moments` loses about
    mean^2 / variance units of 1e-16; features of networks have a ratio below 1e4.
    """

    def __init__(self, dimension: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.sum = torch.zeros(dimension, dtype=torch.float64, device=device)
        self.outer = torch.zeros(dimension, dimension, dtype=torch.float64, device=device)

    @property
    def dimension(self) -> int:
        """Length d of a feature vector."""
        return self.sum.numel()

    @torch.no_grad()
    def update(self, features: Tensor) -> None:
        """Add a batch of features [B, d], any float dtype and device; ValueError for another shape."""
        if features.ndim != 2 or features.shape[1] != self.dimension:
            raise ValueError(f"features of shape {tuple(features.shape)}: expected [batch, {self.dimension}]")
        features = features.to(self.sum.device, torch.float64)
        self.count += features.shape[0]
        self.sum += features.sum(dim=0)
        self.outer.addmm_(features.T, features)

    def merge(self, other: "FeatureStatistics") -> "FeatureStatistics":
        """Return new statistics of both sets together; ValueError if the dimensions differ."""
        if other.dimension != self.dimension:
            raise ValueError(f"cannot merge features of dimension {self.dimension} and {other.dimension}")
        both = FeatureStatistics(self.dimension, self.sum.device)
        both.count = self.count + other.count
        both.sum = self.sum + other.sum.to(self.sum.device)
        both.outer = self.outer + other.outer.to(self.outer.device)
        return both

    def all_reduce(self) -> None:
        """Replace this rank's statistics by those of all ranks; nothing to do outside torch.distributed."""
        # float64 holds integers up to 2^53 exactly, so the count travels with the sums.
        flat = sum_over_ranks(torch.cat([self.sum.new_tensor([float(self.count)]), self.sum, self.outer.flatten()]))
        self.count = int(flat[0].item())
        self.sum = flat[1 : 1 + self.dimension]
        self.outer = flat[1 + self.dimension :].view(self.dimension, self.dimension)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Return mean [d] and unbiased covariance [d, d], float64; ValueError for fewer than two feature vectors."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 feature vectors, got {self.count}")
        mean = self.sum / self.count
        covariance = (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return mean, (covariance + covariance.T) / 2


def _root_factor(covariance: Tensor) -> Tensor:
    """Return L [d, d] with L L^T = covariance. Eigenvalues that are zero but for rounding are set to zero."""
    eigenvalues, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    # eigh is backward stable: a zero eigenvalue comes out at most d eps times as large as the largest one.
    noise = eigenvalues[-1].clamp(min=0) * eigenvalues.numel() * torch.finfo(eigenvalues.dtype).eps
    return vectors * torch.where(eigenvalues > noise, eigenvalues, 0.0).sqrt()


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """Compute |mean1 - mean2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)): the SQUARED Frechet distance, as FID does.

    Means [d], covariances [d, d]; computed in float64, never negative. The trace of the root is the sum of the singular
    values of L1^T L2, where cov = L L^T by symmetric eigendecomposition. No eigenvalue of a product is rooted, so
    covariances of low rank lose no digits. Raises ValueError for shapes that do not match and for values that are not
    finite. Source: Dowson and Landau 1982; Heusel et al. 2017, eq. 6.
    """
    dimension = mean1.numel()
    shapes = [tuple(t.shape) for t in (mean1, cov1, mean2, cov2)]
    if dimension < 1 or shapes != [(dimension,), (dimension, dimension)] * 2:
        raise ValueError(f"shapes {shapes}: expected [d], [d, d], [d], [d, d] with one d")
    mean1, cov1, mean2, cov2 = (t.detach().to(mean1.device, torch.float64) for t in (mean1, cov1, mean2, cov2))
    if not all(bool(torch.isfinite(t).all()) for t in (mean1, cov1, mean2, cov2)):
        raise ValueError("the moments hold NaN or infinite values: so do the features they were computed from")
    root_trace = torch.linalg.svdvals(_root_factor(cov1).T @ _root_factor(cov2)).sum()
    distance = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2.0 * root_trace
    return max(float(distance), 0.0)
