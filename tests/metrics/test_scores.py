"""Scores of features against their formulas, written down once more in numpy."""

import numpy as np
import pytest
import torch
from torch import Tensor

from sadm_fast.metrics.scores import inception_score, kernel_distance, precision_recall, squared_mmd


def features(m: int, n: int, d: int = 6, shift: float = 0.5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, d, generator=generator) + shift, torch.randn(n, d, generator=generator)


def test_the_squared_mmd_is_its_sums_over_pairs():
    x, y = features(9, 7)
    a, b = x.double().numpy(), y.double().numpy()

    def k(u: np.ndarray, v: np.ndarray) -> float:
        return float((u @ v / 6 + 1) ** 3)

    of_x = np.mean([k(a[i], a[j]) for i in range(9) for j in range(9) if i != j])
    of_y = np.mean([k(b[i], b[j]) for i in range(7) for j in range(7) if i != j])
    both = np.mean([k(u, v) for u in a for v in b])
    assert squared_mmd(x, y) == pytest.approx(of_x + of_y - 2 * both, rel=1e-12)


def test_kid_is_about_zero_for_one_distribution_and_grows_with_a_shift():
    same = kernel_distance(*features(300, 300, shift=0.0), subsets=20, size=100)
    near, far = (kernel_distance(*features(300, 300, shift=s), subsets=20, size=100) for s in (0.3, 1.0))
    assert abs(same.mean) < 2 * same.std / 20**0.5 + 0.05 and same.mean < near.mean < far.mean
    x, y = features(30, 40)
    # All rows of the smaller set are one subset, whatever their order; those of the larger one differ.
    assert kernel_distance(x, y[:30], subsets=3, size=1000).std == pytest.approx(0.0, abs=1e-12)
    assert kernel_distance(x, y[:30], subsets=3).mean == pytest.approx(squared_mmd(x, y[:30]), rel=1e-12)
    assert kernel_distance(x, y, subsets=5, seed=1) == kernel_distance(x, y, subsets=5, seed=1)
    assert kernel_distance(x, y, subsets=5, size=20, seed=1) != kernel_distance(x, y, subsets=5, size=20, seed=2)


def test_the_inception_score_is_its_formula():
    p = torch.softmax(3 * torch.randn(50, 7, generator=torch.Generator().manual_seed(0)), dim=1)
    scores = []
    for part in np.array_split(p.double().numpy(), 5):
        scores.append(np.exp(np.mean(np.sum(part * (np.log(part) - np.log(part.mean(axis=0))), axis=1))))
    found = inception_score(p, splits=5)
    assert found.mean == pytest.approx(np.mean(scores), rel=1e-12) and found.std == pytest.approx(np.std(scores))
    certain = torch.eye(4).repeat(10, 1)  # each class as often, each sample certain: as many as there are classes
    assert inception_score(certain, splits=2).mean == pytest.approx(4.0)
    assert inception_score(torch.full((20, 4), 0.25), splits=2).mean == pytest.approx(1.0)


def manifold_share(points: np.ndarray, of: np.ndarray, k: int) -> float:
    """Kynkaanniemi et al. 2019, eq. 1 and 2, point by point."""
    radii = [np.sort(np.linalg.norm(of - center, axis=1))[k] for center in of]  # [0] is the point itself
    inside = [any(np.linalg.norm(p - c) <= r for c, r in zip(of, radii, strict=True)) for p in points]
    return float(np.mean(inside))


@pytest.mark.parametrize("shift", [0.0, 0.8, 2.0])
def test_precision_and_recall_are_their_definition(shift: float, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sadm_fast.metrics.scores._ROWS", 7)
    generated, real = features(40, 30, d=3, shift=shift)
    a, b = generated.double().numpy(), real.double().numpy()
    found = precision_recall(generated, real)
    assert found.precision == manifold_share(a, b, 3) and found.recall == manifold_share(b, a, 3)
    assert precision_recall(real, real) == (1.0, 1.0)


def test_what_has_no_score_is_said():
    x, y = features(5, 5)
    for wrong, message in (
        (lambda: squared_mmd(x[:1], y), "1 and 5 samples: at least 2 of each"),
        (lambda: squared_mmd(x, y[:, :3]), r"shape \(5, 6\) and \(5, 3\): expected \[m, d\] and \[n, d\]"),
        (lambda: precision_recall(x[:3], y), "3 samples: the manifold of 3 neighbours needs more"),
        (lambda: squared_mmd(x.log(), y), "NaN or infinite"),
        (lambda: inception_score(torch.full((5, 2), 0.5)), "in 10 splits needs as many samples, got 5"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
