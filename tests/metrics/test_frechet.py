import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sadm_fast.metrics.frechet import FeatureStatistics, frechet_distance


def features(count: int, dimension: int, rank: int, seed: int) -> Tensor:
    """Correlated features [count, dimension] float64 that span `rank` directions."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(rank, dimension, generator=generator, dtype=torch.float64)
    offset = torch.randn(dimension, generator=generator, dtype=torch.float64)
    return torch.randn(count, rank, generator=generator, dtype=torch.float64) @ mixing + offset


def moments(samples: Tensor) -> tuple[Tensor, Tensor]:
    return samples.mean(dim=0), torch.from_numpy(np.cov(samples.numpy(), rowvar=False))


def by_matrix_root(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    root = scipy.linalg.sqrtm(cov1.numpy() @ cov2.numpy())
    trace = np.trace(cov1.numpy()) + np.trace(cov2.numpy()) - 2.0 * np.trace(root).real
    return float((mean1 - mean2).square().sum()) + float(trace)


def test_equals_scipys_matrix_root_on_fixed_features():
    first, second = moments(features(300, 24, 24, seed=0)), moments(features(200, 24, 24, seed=1))
    assert frechet_distance(*first, *second) == pytest.approx(by_matrix_root(*first, *second), rel=1e-10)


@pytest.mark.filterwarnings("ignore:Matrix is singular")
@pytest.mark.parametrize(("count", "rank"), [(300, 6), (10, 24)])
def test_equals_scipys_matrix_root_for_covariances_of_low_rank(count: int, rank: int):
    first, second = moments(features(count, 24, rank, seed=2)), moments(features(count, 24, rank, seed=3))
    # scipy takes roots of eigenvalues that should be 0 and are 1e-16: its own error is about 24 * 1e-8.
    scale = float(first[1].trace() + second[1].trace())
    assert frechet_distance(*first, *second) == pytest.approx(by_matrix_root(*first, *second), abs=1e-6 * scale)


@pytest.mark.parametrize("rank", [1, 5, 16])
def test_equal_gaussians_have_distance_zero(rank: int):
    mean, covariance = moments(features(100, 16, rank, seed=4))
    # Traces of about 256 in 16 dimensions: a rounding error of some 1e-13, and never below zero.
    assert 0.0 <= frechet_distance(mean, covariance, mean, covariance) < 1e-11


def test_shift_of_the_mean_alone_gives_its_squared_length():
    mean, covariance = moments(features(100, 8, 8, seed=5))
    shift = torch.arange(8, dtype=torch.float64)
    assert frechet_distance(mean, covariance, mean + shift, covariance) == pytest.approx(140.0, rel=1e-12)


@given(
    st.tuples(*[st.floats(-100, 100)] * 2),
    st.tuples(*[st.floats(0, 100)] * 2),
)
def test_one_dimension_is_difference_of_means_and_of_deviations(means, deviations):
    arguments = [
        torch.tensor(v, dtype=torch.float64).view(shape)
        for mean, deviation in zip(means, deviations, strict=True)
        for v, shape in ((mean, (1,)), (deviation**2, (1, 1)))
    ]
    expected = (means[0] - means[1]) ** 2 + (deviations[0] - deviations[1]) ** 2
    # s1^2 + s2^2 - 2 s1 s2 cancels: the absolute error is some 1e-16 of the variances.
    assert frechet_distance(*arguments) == pytest.approx(expected, rel=1e-12, abs=1e-11)


def test_commuting_singular_covariances_to_full_precision():
    basis = torch.linalg.qr(features(6, 6, 6, seed=6))[0]
    first = torch.tensor([4.0, 1.0, 9.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    second = torch.tensor([1.0, 0.0, 16.0, 25.0, 0.0, 0.0], dtype=torch.float64)
    covariances = [basis @ torch.diag(v) @ basis.T for v in (first, second)]
    zero = torch.zeros(6, dtype=torch.float64)
    expected = float((first.sqrt() - second.sqrt()).square().sum())
    assert frechet_distance(zero, covariances[0], zero, covariances[1]) == pytest.approx(expected, rel=1e-12)


def test_is_symmetric():
    first, second = moments(features(50, 12, 12, seed=7)), moments(features(50, 12, 4, seed=8))
    assert frechet_distance(*first, *second) == pytest.approx(frechet_distance(*second, *first), rel=1e-11)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", range(4))
def test_refuses_values_that_are_not_finite(bad: float, place: int):
    arguments = [*moments(features(50, 3, 3, seed=9)), *moments(features(50, 3, 3, seed=10))]
    arguments[place].view(-1)[0] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        frechet_distance(*arguments)


def test_refuses_shapes_that_do_not_match():
    first, second = moments(features(50, 3, 3, seed=11)), moments(features(50, 4, 4, seed=12))
    with pytest.raises(ValueError, match=r"\(3,\).*\(4,\)"):
        frechet_distance(*first, *second)
    with pytest.raises(ValueError, match="expected"):
        frechet_distance(first[0], first[0], first[0], first[1])


def test_statistics_give_numpys_mean_and_unbiased_covariance():
    samples = features(57, 5, 5, seed=13)
    statistics = FeatureStatistics(5)
    for part in samples.split(20):
        statistics.update(part)
    mean, covariance = statistics.moments()
    torch.testing.assert_close(mean, moments(samples)[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(covariance, moments(samples)[1], rtol=1e-12, atol=1e-12)
    assert statistics.count == 57


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_accumulate_narrow_features_in_float64(dtype: torch.dtype):
    # Variance 1e-4 of the squared mean: float32 sums would lose it after a few thousand samples.
    samples = (features(4000, 3, 3, seed=14) + 100.0).to(dtype)
    statistics = FeatureStatistics(3)
    statistics.update(samples)
    torch.testing.assert_close(statistics.moments()[1], moments(samples.double())[1], rtol=1e-10, atol=1e-10)


@settings(max_examples=50, deadline=None)  # the machine may be busy
@given(
    dimension=st.integers(1, 6),
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(lambda sizes: sum(sizes) >= 2),
    seed=st.integers(0, 2**16),
)
def test_merged_parts_equal_the_whole(dimension: int, sizes: list[int], seed: int):
    samples = features(sum(sizes), dimension, dimension, seed)
    whole = FeatureStatistics(dimension)
    whole.update(samples)
    merged = FeatureStatistics(dimension)
    for part in samples.split(sizes):
        piece = FeatureStatistics(dimension)
        piece.update(part)
        merged = merged.merge(piece)
    assert merged.count == whole.count
    # Only the order of float64 sums of at most 45 numbers of some tens differs.
    torch.testing.assert_close(merged.moments(), whole.moments(), rtol=1e-10, atol=1e-10)


def test_merge_leaves_its_operands_alone():
    first, second = FeatureStatistics(2), FeatureStatistics(2)
    second.update(torch.ones(3, 2))
    assert first.merge(second).count == 3
    assert (first.count, second.count) == (0, 3)
    assert first.sum.tolist() == [0.0, 0.0]


def test_statistics_refuse_what_they_cannot_use():
    statistics = FeatureStatistics(3)
    with pytest.raises(ValueError, match=r"\[batch, 3\]"):
        statistics.update(torch.zeros(4, 2))
    with pytest.raises(ValueError, match="dimension 3 and 2"):
        statistics.merge(FeatureStatistics(2))
    statistics.update(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="at least 2 feature vectors, got 1"):
        statistics.moments()
