"""What S must not notice: the scale of weights and of features, a common mean, batches in which no pair counts."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sadm_kernels import Queue, backends, ops, structure_loss
from sadm_kernels.reference import NORMALIZATIONS, RELATIONS
from sadm_kernels.scaling import power_of_two

needs_kernel = pytest.mark.skipif(backends()["native"] != "ok", reason=backends()["native"])
implementations = pytest.mark.parametrize("impl", ["reference", pytest.param("native", marks=needs_kernel)])
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
EPS = torch.finfo(torch.float32).eps
options_of_relations = [
    {"relation": r, "normalize": n}
    for r, n in itertools.product(RELATIONS, NORMALIZATIONS)
    if r != "cosine" or n == "none"
]


def features(size: int, d: int, dtype: torch.dtype = torch.float64, mean: float = 0.0) -> tuple[Tensor, Tensor]:
    real, fake = torch.randn(2, size, d, dtype=torch.float64, generator=torch.Generator().manual_seed(size)) + mean
    return real.to(dtype), fake.to(dtype)


def evaluate(real: Tensor, fake: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    real, fake = real.detach().clone().requires_grad_(True), fake.detach().clone().requires_grad_(True)
    loss = structure_loss(real, fake, **options)
    grad_real, grad_fake = torch.autograd.grad(loss, (real, fake))
    return loss.detach(), grad_real, grad_fake


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_power_of_two_is_never_above_what_it_is_of(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    size = torch.tensor([1.0, 2.0, 3.0, 0.75, limits.max, limits.tiny, limits.smallest_normal * 2**-5], dtype=dtype)
    found = power_of_two(size)
    assert (found <= size).all() and (2 * found.double() > size.double()).all()
    assert (torch.frexp(found).mantissa == 0.5).all()
    assert power_of_two(torch.tensor([0.0, math.inf, math.nan])).tolist() == [1.0, 1.0, 1.0]


def no_pair(size: int, d: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    past = features(2 * size, d, dtype)
    labels, one = torch.arange(size), torch.arange(size) == 1
    return [
        {"labels": labels},
        {"weight": one.float()},
        {"weight": one.double() * 1e-300, "labels": labels % 2},
        {"labels": labels, "queue": Queue(*past, None, torch.arange(2 * size) + size)},
        {"weight": one.float(), "queue": Queue(*past, torch.zeros(2 * size))},
    ]


@implementations
@dtypes
def test_where_no_pair_counts_loss_and_gradients_are_zero(impl: str, dtype: torch.dtype) -> None:
    real, fake = features(6, 8, dtype)
    for given, options in itertools.product(no_pair(6, 8, dtype), options_of_relations):
        for value in evaluate(real, fake, impl=impl, **given, **options):
            assert not value.any(), (given.keys(), options)


@needs_kernel
@dtypes
def test_where_no_pair_counts_the_compiled_operator_gives_zero(dtype: torch.dtype) -> None:
    real, fake = (x.requires_grad_(True) for x in features(6, 8, dtype))
    rest = (None, torch.arange(6), *(None,) * 4, "euclidean", "squared", "unit", None, None, "native", True, True)
    loss = ops._structure_loss(real, fake, *rest)[0]
    assert not loss.any() and not any(grad.any() for grad in torch.autograd.grad(loss, (real, fake)))


@implementations
@pytest.mark.parametrize("with_queue", [False, True])
def test_only_ratios_of_weights_count(impl: str, with_queue: bool) -> None:
    real, fake = features(12, 8, torch.float32)
    weight, past = torch.linspace(0.1, 1, 12), torch.linspace(0.2, 2, 7)

    def found(factor: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
        queue = Queue(*features(7, 8, torch.float32), past.to(dtype) * factor) if with_queue else None
        return evaluate(real, fake, weight=weight.to(dtype) * factor, queue=queue, impl=impl, normalize="mean")

    expected = found(1.0)
    for exponent in (-100, -80, -60, 60, 100, 126):  # exact, so not a bit may change
        assert all(torch.equal(a, b) for a, b in zip(found(2.0**exponent), expected, strict=True)), exponent
    for value in (1e-25, 1e-22, 1e30):  # every weight is rounded once: half an eps a factor of a pair's weight
        assert all(error(a, b) < 4 * EPS for a, b in zip(found(value), expected, strict=True)), value
    # What float32 cannot hold at all.
    assert all(error(a, b) < 4 * EPS for a, b in zip(found(1e-200, torch.float64), expected, strict=True))


@implementations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("relation", RELATIONS)
def test_unit_rows_may_have_any_length(impl: str, dtype: torch.dtype, relation: str) -> None:
    real, fake = features(16, 24, dtype)
    exact = evaluate(real.double(), fake.double(), relation=relation, impl="reference")
    # Sums of some hundred terms in float32; one rounding of weights and of gradients to bfloat16.
    units = [64 * EPS, *[2 * torch.finfo(dtype).eps if dtype == torch.bfloat16 else 64 * EPS] * 2]
    spread = torch.linspace(-66, 66, 16).round()[:, None].expand(16, 24)
    for exponent in (torch.tensor(66.0), torch.tensor(-66.0), torch.tensor(-100.0), torch.tensor(110.0), spread):
        factor = torch.exp2(exponent.double())
        scaled = ((x.double() * factor).to(dtype) for x in (real, fake))
        loss, *grads = evaluate(*scaled, relation=relation, impl=impl)
        assert error(loss, exact[0]) < units[0], exponent
        for grad, expected, unit in zip(grads, exact[1:], units[1:], strict=True):
            assert error(grad.double() * factor, expected) < unit, exponent


@implementations
@dtypes
def test_unit_rows_may_be_the_largest_numbers_of_a_dtype(impl: str, dtype: torch.dtype) -> None:
    real, fake = features(8, 16, dtype)
    factor = 2.0 ** math.floor(math.log2(torch.finfo(dtype).max) - 3)
    expected = structure_loss(real.double(), fake.double(), impl="reference")
    assert error(structure_loss(real * factor, fake * factor, impl=impl), expected) < 64 * EPS


@implementations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exponent", [60, -60])
def test_distances_that_are_not_normalised_grow_with_the_features(impl: str, dtype: torch.dtype, exponent: int) -> None:
    """S is finite wherever float32 holds it, though the squares of distances leave its range."""
    real, fake = features(16, 8, dtype)
    factor = 2.0**exponent
    units = [64 * EPS, *[2 * torch.finfo(dtype).eps if dtype == torch.bfloat16 else 64 * EPS] * 2]
    for penalty, power in (("squared", 2), ("absolute", 1)):
        for normalize, times in (("none", factor**power), ("mean", 1.0)):
            options = {"penalty": penalty, "normalize": normalize}
            exact = evaluate(real.double(), fake.double(), impl="reference", **options)
            found = evaluate(real * factor, fake * factor, impl=impl, **options)
            for value, expected, unit, by in zip(found, exact, units, (times, *[times / factor] * 2), strict=True):
                assert error(value.double() / by, expected) < unit, options
    if exponent > 0:
        assert structure_loss(real * 2.0**70, fake * 2.0**70, normalize="none", impl=impl) == math.inf


@implementations
@pytest.mark.parametrize("mean", [100.0, 1000.0, 10000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_mean_of_many_standard_deviations_costs_little(impl: str, mean: float, dtype: torch.dtype) -> None:
    """Against float64 on the same rounded features."""
    real, fake = features(64, 48, dtype, mean)
    for given in options_of_relations:
        unit = given["relation"] == "cosine" or given["normalize"] == "unit"
        if mean == 10000.0 and (dtype != torch.float32 or (given["relation"] == "gaussian" and unit)):
            continue  # all rows are equal there, or all relations 1
        options: dict[str, Any] = given | {"tau": 10.0 if given["normalize"] == "none" else 1.0}
        exact = evaluate(real.double(), fake.double(), impl="reference", **options)
        found = evaluate(real, fake, impl=impl, **options)
        # Rows of length 1 are rounded to eps / 2, and their distances are 1 / mean: eps * mean. A gaussian relation
        # is rounded to eps / 2 as well, and 1 / mean^2 below 1. Others keep all digits.
        limit = 32 * EPS + (2 * mean * EPS if unit else 0)
        if options["relation"] == "gaussian" and unit:
            limit += mean**2 * EPS / 4
        assert error(found[0], exact[0]) < limit, options
        if dtype != torch.float16:  # gradients of order 1 / mean^2 underflow there
            limit += 2 * torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0
            assert all(error(a, b) < limit for a, b in zip(found[1:], exact[1:], strict=True)), options


def assert_equal_rows_are_one_point(impl: str) -> None:
    for dtype, mean, scale in itertools.product(
        (torch.float64, torch.float32, torch.bfloat16), (0.0, 1.0, 1000.0, 1e6), (1.0, 1e-3)
    ):
        real, fake = (scale * x for x in features(9, 5, dtype, mean))
        for x in (real, fake):
            x[1], x[4] = x[0], x[0]
            x[2] = 0.0
            x[7] = 0.0
        weight = torch.tensor([1.0, 1, 0, 0, 1, 0, 0, 0, 0])
        zeros = torch.tensor([0.0, 0, 1, 0, 0, 0, 0, 1, 0])
        for options, w in itertools.product(options_of_relations, (weight, zeros)):
            loss, *grads = evaluate(real, fake.roll(1, 1), weight=w, penalty="absolute", impl=impl, **options)
            if options["relation"] == "cosine":
                continue
            assert loss == 0 and not any(g.any() for g in grads), (dtype, mean, scale, options)


def test_equal_rows_are_at_distance_zero_for_the_reference() -> None:
    assert_equal_rows_are_one_point("reference")


def test_equal_rows_are_at_distance_zero_on_every_instruction_set(instruction_set: str) -> None:
    assert_equal_rows_are_one_point("native")
    fake = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 2.0]], dtype=torch.float64)
    found = structure_loss(torch.zeros_like(fake), fake, normalize="mean", impl="native")
    assert float(found) == pytest.approx(1.5, rel=1e-15)  # distances 0, 3/2 and 3/2 of their mean


@implementations
def test_rows_of_one_direction_are_one_point_of_unit_length(impl: str) -> None:
    real, fake = features(6, 33, torch.float32, 1000.0)
    fake[:] = fake[0] * torch.tensor([1.0, 3.0, 0.7, 1e-3, 1e4, 11.0])[:, None]
    matrix_of_fake_is_zero = structure_loss(real, fake, penalty="absolute", impl=impl)
    alone = structure_loss(real, fake[:1].expand(6, 33), penalty="absolute", impl=impl)
    assert error(matrix_of_fake_is_zero, alone) < 4 * EPS
