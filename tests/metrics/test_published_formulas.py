"""Scores against the formulas of the published tools, written down independently, on fixed features to 1e-6.

What the tools do was read in pytorch-fid b9c1811, torch-fidelity 5e211a9 and ADM's evaluator (guided-diffusion
22e0df8): FID of `np.cov` moments and scipy's matrix root; sFID the same of spatial features; IS in 10 splits of p log p
- p log q; KID as the mean over subsets of (x.y / d + 1)^3; precision and recall with k = 3, the point itself being the
nearest of its own neighbours.
"""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from sadm_fast.counters import permutation
from sadm_fast.metrics.evaluator import Evaluator
from sadm_fast.metrics.judges import PROBABILITIES, Judge
from sadm_fast.metrics.scores import inception_score, kernel_distance, precision_recall

D, SPATIAL, CLASSES = 24, 18, 12


class Fixed(Judge):
    """Images whose pixels are the features: the first rows pooled ones, then spatial ones, then logits."""

    metric, space, text = "fid_fixed", "fixed", "Fixed features."
    feature_dim, classes = D, CLASSES
    more_spaces = {"sfid_fixed": SPATIAL}  # noqa: RUF012

    def look(self, images: Tensor) -> dict[str, Tensor]:
        values = images.flatten(1)
        pooled, spatial, logits = values[:, : D + SPATIAL + CLASSES].split([D, SPATIAL, CLASSES], dim=1)
        return {"fid_fixed": pooled, "sfid_fixed": spatial, PROBABILITIES: (4 * logits).softmax(dim=1)}


def images(count: int, seed: int, shift: float) -> Tensor:
    """Float32 [count, 1, 8, 8] of 8-bit values in [-1, 1], correlated."""
    mixing, rng = np.random.default_rng(99).normal(size=(8, 64)), np.random.default_rng(seed)
    values = np.tanh(rng.normal(size=(count, 8)) @ mixing / 4 + shift) + 0.02 * rng.normal(size=(count, 64))
    levels = np.clip(np.round((values + 1) * 127.5), 0, 255)
    return torch.from_numpy((levels / 127.5 - 1).astype(np.float32)).view(count, 1, 8, 8)


REAL, GENERATED = images(400, 0, 0.0), images(303, 1, 0.2)  # 303: in 10 splits of 30 and 31


def rows(of: Tensor, name: str) -> np.ndarray:
    return Fixed().look(of)[name].double().numpy()


def frechet(x: np.ndarray, y: np.ndarray) -> float:
    """calculate_frechet_distance of pytorch-fid, and of ADM's FIDStatistics."""
    root = scipy.linalg.sqrtm(np.cov(x, rowvar=False) @ np.cov(y, rowvar=False)).real
    difference = x.mean(axis=0) - y.mean(axis=0)
    return float(
        difference @ difference
        + np.trace(np.cov(x, rowvar=False))
        + np.trace(np.cov(y, rowvar=False))
        - 2 * np.trace(root)
    )


def polynomial_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """polynomial_mmd of torch-fidelity: degree 3, gamma 1 / d, coefficient 1, unbiased."""
    m, k = len(x), [(a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))]
    off_diagonal = sum(of.sum() - np.diagonal(of).sum() for of in k[:2]) / (m * (m - 1))
    return float(off_diagonal - 2 * k[2].sum() / (m * m))


def split_scores(p: np.ndarray, splits: int) -> list[float]:
    """Parts i n // splits to (i + 1) n // splits, as torch-fidelity and the first implementation have them."""
    found = []
    for i in range(splits):
        part = p[i * len(p) // splits : (i + 1) * len(p) // splits]
        divergence = part * (np.log(part) - np.log(part.mean(axis=0, keepdims=True)))
        found.append(float(np.exp(divergence.sum(axis=1).mean())))
    return found


def manifold(x: np.ndarray, y: np.ndarray, k: int = 3) -> float:
    """The share of x inside the balls around y, by ADM's squared distances: radii are the k-th of the sorted ones."""

    def squared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return ((a[:, None] - b[None]) ** 2).sum(axis=2)

    radii = np.partition(squared(y, y), k, axis=1)[:, k]
    return float((squared(x, y) <= radii).any(axis=1).mean())


@pytest.fixture(scope="module")
def scores() -> dict:
    return Evaluator.build(REAL, [Fixed()], detailed=True).score(GENERATED)


@pytest.mark.parametrize("name", ["fid_fixed", "sfid_fixed"])
def test_fid_and_sfid_are_those_of_pytorch_fid_and_adm(scores: dict, name: str) -> None:
    assert scores[name] == pytest.approx(frechet(rows(GENERATED, name), rows(REAL, name)), rel=1e-6)


def test_the_inception_score_is_that_of_torch_fidelity(scores: dict) -> None:
    p = rows(GENERATED, PROBABILITIES)
    expected = split_scores(p[permutation(0, 0, len(p)).numpy()], 10)
    assert scores["inception_score"] == pytest.approx(np.mean(expected), rel=1e-6)
    assert scores["inception_score_std"] == pytest.approx(np.std(expected), rel=1e-6)


def test_the_inception_score_is_that_of_adm_where_its_splits_of_5000_rows_are_ten() -> None:
    p = torch.softmax(2 * torch.randn(50_000, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    q = p.double().numpy()
    parts = [q[i : i + 5000] for i in range(0, len(q), 5000)]
    expected = [np.exp((part * np.log(part / part.mean(axis=0))).sum(axis=1).mean()) for part in parts]
    assert inception_score(p).mean == pytest.approx(np.mean(expected), rel=1e-6)


def test_kid_is_that_of_torch_fidelity_on_the_same_subsets(scores: dict) -> None:
    x, y = rows(GENERATED, "fid_fixed"), rows(REAL, "fid_fixed")
    found = [
        polynomial_mmd(
            x[permutation(7, 2 * subset, len(x)).numpy()[:50]], y[permutation(7, 2 * subset + 1, len(y)).numpy()[:50]]
        )
        for subset in range(20)
    ]
    kid = kernel_distance(torch.from_numpy(x), torch.from_numpy(y), subsets=20, size=50, seed=7)
    assert kid.mean == pytest.approx(np.mean(found), rel=1e-6) and kid.std == pytest.approx(np.std(found), rel=1e-6)
    # The table's are subsets of 1,000, or here of all 303.
    subsets = [polynomial_mmd(x, y[permutation(0, 2 * subset + 1, len(y)).numpy()[:303]]) for subset in range(100)]
    assert scores["kid"]["fid_fixed"] == pytest.approx(np.mean(subsets), rel=1e-6)


def test_precision_and_recall_are_those_of_adm(scores: dict) -> None:
    x, y = rows(GENERATED, "fid_fixed"), rows(REAL, "fid_fixed")
    expected = manifold(x, y), manifold(y, x)
    assert min(expected) > 0.05 and max(expected) < 0.95
    assert (scores["precision"]["fid_fixed"], scores["recall"]["fid_fixed"]) == expected
    assert tuple(precision_recall(torch.from_numpy(x), torch.from_numpy(y))) == expected
