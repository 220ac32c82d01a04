"""The structure loss of every backend on the CPU against its definition: by hand, by two nested loops, by differences.

What only the fused kernels promise stands in test_native.py and test_ops.py; the Triton kernels have triton/.
"""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sadm_kernels
from sadm_kernels import backends, relation_matrix
from sadm_kernels.capabilities import FUSED
from sadm_kernels.reference import NORMALIZATIONS, PENALTIES

RELATIONS = FUSED["native"].relation  # one that only the reference knows has tests of its own

implementation = ""


@pytest.fixture(scope="module", autouse=True, params=["reference", "native"])
def impl(request: pytest.FixtureRequest) -> str:
    """Every test of this file runs once for each backend."""
    global implementation
    implementation = request.param
    if backends()[implementation] != "ok":
        pytest.skip(backends()[implementation])
    return implementation


def structure_loss(real: Tensor, fake: Tensor, **options: Any) -> Tensor:
    return sadm_kernels.structure_loss(real, fake, impl=implementation, **options)


quick = settings(deadline=None, max_examples=25)
combinations = list(itertools.product(RELATIONS, PENALTIES, NORMALIZATIONS))
every_combination = pytest.mark.parametrize(("relation", "penalty", "normalize"), combinations)
any_combination = st.sampled_from(combinations)


def naive(
    real: Tensor,
    fake: Tensor,
    *,
    relation: str,
    penalty: str,
    normalize: str,
    weight: list[float] | None = None,
    labels: list[int] | None = None,
    tau: float = 1.0,
    delta: float = 1.0,
) -> tuple[float, float]:
    """S by definition in Python floats, and the largest difference of two relations."""
    size = len(real)
    pairs = [
        (i, j, (1.0 if weight is None else weight[i] * weight[j]))
        for i in range(size)
        for j in range(size)
        if i != j and (labels is None or labels[i] == labels[j])
    ]
    total = sum(w for _, _, w in pairs)
    if total == 0:
        return 0.0, 0.0

    def relations(features: Tensor) -> dict[tuple[int, int], float]:
        rows = [[float(v) for v in row] for row in features]
        if relation == "cosine" or normalize == "unit":
            lengths = [math.hypot(*row) or 1.0 for row in rows]
            rows = [[v / length for v in row] for row, length in zip(rows, lengths, strict=True)]
        if relation == "cosine":
            return {(i, j): sum(a * b for a, b in zip(rows[i], rows[j], strict=True)) for i, j, _ in pairs}
        distance = {(i, j): math.dist(rows[i], rows[j]) for i, j, _ in pairs}
        if normalize == "mean":
            mean = sum(w * distance[i, j] for i, j, w in pairs) / total or 1.0
            distance = {pair: r / mean for pair, r in distance.items()}
        if relation == "euclidean":
            return distance
        return {pair: math.exp(-(r**2) / (2 * tau**2)) for pair, r in distance.items()}

    def rho(x: float) -> float:
        if penalty == "squared":
            return x * x
        if penalty == "absolute" or abs(x) > delta:
            return abs(x) if penalty == "absolute" else delta * (abs(x) - delta / 2)
        return x * x / 2

    of_real, of_fake = relations(real), relations(fake)
    difference = {pair: of_fake[pair] - of_real[pair] for pair in of_real}
    loss = sum(w * rho(difference[i, j]) for i, j, w in pairs) / total
    return loss, max(map(abs, difference.values()))


# Distances 3, 4, 5 (pairs 01, 02, 12) against 1, 2, 1.
TRIANGLE = [[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]]
LINE = [[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]]
# Of length 1: distances sqrt 2, 2, sqrt 2 against 0, sqrt 2, sqrt 2; cosines 0, -1, 0 against 1, 0, 0.
CROSS = [[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]]
RAYS = [[1.0, 0.0], [5.0, 0.0], [0.0, 1.0]]
ROOT = math.sqrt(2.0)
E = math.exp
GAUSSIAN = {"relation": "gaussian", "normalize": "none"}


def g(x: float) -> float:
    """The gaussian relation at squared distance x and tau = 1."""
    return E(-x / 2)


@pytest.mark.parametrize(
    ("real", "fake", "options", "expected"),
    [
        (TRIANGLE, LINE, {"normalize": "none"}, (4 + 4 + 16) / 3),
        (TRIANGLE, LINE, {"normalize": "none", "penalty": "absolute"}, (2 + 2 + 4) / 3),
        (TRIANGLE, LINE, {"normalize": "none", "penalty": "huber"}, (1.5 + 1.5 + 3.5) / 3),
        (TRIANGLE, LINE, {"normalize": "none", "penalty": "huber", "delta": 2.0}, (2 + 2 + 6) / 3),
        # Divided by their means 4 and 4/3: 0.75, 1, 1.25 against 0.75, 1.5, 0.75.
        (TRIANGLE, LINE, {"normalize": "mean"}, (0 + 0.25 + 0.25) / 3),
        (TRIANGLE, LINE, {"normalize": "mean", "penalty": "absolute"}, 1 / 3),
        (TRIANGLE, LINE, {"normalize": "mean", "penalty": "huber", "delta": 0.25}, 2 * 0.25 * 0.375 / 3),
        (CROSS, RAYS, {"normalize": "unit"}, (2 + (2 - ROOT) ** 2) / 3),
        (CROSS, RAYS, {"normalize": "unit", "penalty": "absolute"}, 2 / 3),
        (CROSS, RAYS, {"normalize": "unit", "penalty": "huber"}, (ROOT - 0.5 + (2 - ROOT) ** 2 / 2) / 3),
        (CROSS, RAYS, {"relation": "cosine"}, 2 / 3),
        (CROSS, RAYS, {"relation": "cosine", "penalty": "absolute"}, 2 / 3),
        (CROSS, RAYS, {"relation": "cosine", "penalty": "huber", "delta": 0.5}, 2 * 0.5 * 0.75 / 3),
        (
            TRIANGLE,
            LINE,
            GAUSSIAN | {"tau": 2.0, "penalty": "absolute"},
            (E(-1 / 8) - E(-9 / 8) + E(-4 / 8) - E(-16 / 8) + E(-1 / 8) - E(-25 / 8)) / 3,
        ),
        (TRIANGLE, LINE, GAUSSIAN, ((g(1) - g(9)) ** 2 + (g(4) - g(16)) ** 2 + (g(1) - g(25)) ** 2) / 3),
        (CROSS, RAYS, {"relation": "gaussian"}, ((1 - g(2)) ** 2 + (g(2) - g(4)) ** 2) / 3),
        (
            CROSS,
            RAYS,
            {"relation": "gaussian", "penalty": "huber", "delta": 9.0},
            ((1 - g(2)) ** 2 + (g(2) - g(4)) ** 2) / 6,
        ),
        (TRIANGLE, LINE, GAUSSIAN | {"normalize": "mean"}, ((g(2.25) - g(1)) ** 2 + (g(0.5625) - g(1.5625)) ** 2) / 3),
        # Pair weights 2, 3, 6.
        (TRIANGLE, LINE, {"normalize": "none", "weight": (1, 2, 3)}, (2 * 4 + 3 * 4 + 6 * 16) / 11),
        (TRIANGLE, LINE, {"normalize": "none", "weight": (0, 2, 3)}, 16.0),
        # Weighted means 48/11 and 14/11.
        (
            TRIANGLE,
            LINE,
            {"normalize": "mean", "penalty": "absolute", "weight": (1, 2, 3)},
            (2 * 11 * (1 / 14 - 3 / 48) + 3 * 11 * (2 / 14 - 4 / 48) + 6 * 11 * (5 / 48 - 1 / 14)) / 11,
        ),
        (TRIANGLE, LINE, {"normalize": "none", "labels": (7, 7, 2)}, 4.0),
        (TRIANGLE, LINE, {"normalize": "none", "labels": (7, 2, 7), "weight": (1, 2, 3)}, 4.0),
        # A mean over the counted pairs: of the pairs of one class there is one, so both relations are 1.
        (TRIANGLE, LINE, {"normalize": "mean", "labels": (7, 2, 2)}, 0.0),
        (TRIANGLE, LINE, {"labels": (0, 1, 2)}, 0.0),
        (TRIANGLE, LINE, {"normalize": "none", "weight": (0, 0, 3)}, 0.0),
    ],
)
def test_by_hand(real: Any, fake: Any, options: dict[str, Any], expected: float) -> None:
    options = options | {name: torch.tensor(options[name]) for name in ("weight", "labels") if name in options}
    for dtype in (torch.float64, torch.float32):
        found = structure_loss(torch.tensor(real, dtype=dtype), torch.tensor(fake, dtype=dtype), **options)
        # The values are of order 1 to 10, with some ten roundings.
        assert float(found) == pytest.approx(expected, rel=32 * torch.finfo(dtype).eps, abs=32 * torch.finfo(dtype).eps)


def test_gradient_by_hand() -> None:
    real, fake = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [6.0]])
    for x in (real, fake):
        x.requires_grad_(True)
    structure_loss(real, fake, normalize="none").backward()
    # S = (|g1 - g0| - |f1 - f0|)^2 = 3^2
    assert fake.grad is not None and fake.grad.flatten().tolist() == pytest.approx([-6.0, 6.0])
    assert real.grad is not None and real.grad.flatten().tolist() == pytest.approx([6.0, -6.0])


integer_rows = st.integers(1, 4).flatmap(
    lambda d: st.lists(st.tuples(*2 * [st.lists(st.integers(-4, 4), min_size=d, max_size=d)]), max_size=6).map(
        lambda rows: (d, rows)
    )
)


@settings(deadline=None, max_examples=150)
@given(
    rows=integer_rows,
    combination=any_combination,
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    tau=st.sampled_from([0.5, 1.0, 3.0]),
    delta=st.sampled_from([0.25, 1.0]),
    data=st.data(),
)
def test_equals_two_nested_loops(rows, combination, dtype, tau, delta, data) -> None:
    d, pairs = rows
    size = len(pairs)
    real = torch.tensor([p[0] for p in pairs], dtype=dtype).reshape(size, d)
    fake = torch.tensor([p[1] for p in pairs], dtype=dtype).reshape(size, d)
    weight = data.draw(st.none() | st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=size, max_size=size))
    if weight is not None and not any(weight):
        weight = None
    labels = data.draw(st.none() | st.lists(st.integers(0, 2), min_size=size, max_size=size))
    options: dict[str, Any] = dict(zip(("relation", "penalty", "normalize"), combination, strict=True))
    options |= {"tau": tau, "delta": delta}

    expected, largest = naive(real, fake, weight=weight, labels=labels, **options)
    found = structure_loss(
        real,
        fake,
        weight=None if weight is None else torch.tensor(weight),
        labels=None if labels is None else torch.tensor(labels, dtype=torch.int64),
        **options,
    )
    assert found.shape == () and found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # Integers are exact in every dtype, and two different unit rows made of them are at least 1/64 apart, so that
    # squared distances, known to 16 eps (unit) or 8 eps * 128 (none, distances >= 1), give relations to 2^9 eps;
    # rho' is at most 2 max |difference| or 1, and two matrices err: 2^11 eps.
    assert float(found) == pytest.approx(expected, rel=0, abs=2**11 * torch.finfo(found.dtype).eps * max(1.0, largest))


def features(size: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    real, fake = torch.randn(2, size, d, generator=generator, dtype=torch.float64).to(dtype)
    return real.clone(), fake.clone()


def gradients(real: Tensor, fake: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    real, fake = real.detach().clone().requires_grad_(True), fake.detach().clone().requires_grad_(True)
    loss = structure_loss(real, fake, **options)
    grad_real, grad_fake = torch.autograd.grad(loss, (real, fake))
    return loss.detach(), grad_real, grad_fake


@every_combination
def test_gradients_equal_finite_differences(relation, penalty, normalize, impl) -> None:
    # Weights and labels meet every relation, every penalty and every normalisation, with and without each other.
    number = sum(map(list.index, map(list, (RELATIONS, PENALTIES, NORMALIZATIONS)), (relation, penalty, normalize)))
    weighted, labelled = number % 4 in (1, 2), number % 4 in (2, 3)
    real, fake = (x.requires_grad_(True) for x in features(4, 2, seed=3))
    # The reference alone has a gradient for the weight, and a second derivative.
    weight = torch.tensor([0.3, 1.0, 0.7, 2.0], dtype=torch.float64, requires_grad=impl == "reference")
    labels = torch.tensor([1, 1, 0, 1])

    def loss(real: Tensor, fake: Tensor, weight: Tensor) -> Tensor:
        return (
            structure_loss(
                real,
                fake,
                relation=relation,
                penalty=penalty,
                normalize=normalize,
                weight=weight if weighted else None,
                labels=labels if labelled else None,
                tau=0.8,
                delta=0.2,
            )
            + 0.0 * weight.sum()
        )

    assert torch.autograd.gradcheck(loss, (real, fake, weight))
    if impl == "reference":
        assert torch.autograd.gradgradcheck(
            loss, (real, fake, weight), fast_mode=True, gen_non_contig_grad_outputs=True
        )


@every_combination
def test_one_inputs_gradient_does_not_depend_on_the_other_asking(relation, penalty, normalize) -> None:
    options = {"relation": relation, "penalty": penalty, "normalize": normalize}
    real, fake = features(5, 3)
    _, grad_real, grad_fake = gradients(real, fake, **options)
    for asked, expected in ((real, grad_real), (fake, grad_fake)):
        one = asked.clone().requires_grad_(True)
        pair = (one, fake) if asked is real else (real, one)
        (found,) = torch.autograd.grad(structure_loss(*pair, **options), one)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_cosine_ignores_the_normalisation(normalize: str) -> None:
    real, fake = features(5, 3)
    loss = structure_loss(real, fake, relation="cosine", normalize=normalize)
    assert torch.equal(loss, structure_loss(real, fake, relation="cosine", normalize="none"))


@every_combination
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_inputs_are_computed_in_float32(relation, penalty, normalize, dtype, impl) -> None:
    options = {"relation": relation, "penalty": penalty, "normalize": normalize}
    real, fake = features(7, 5, dtype=dtype)
    loss, *narrow = gradients(real, fake, **options)
    wide_loss, *wide = gradients(real.float(), fake.float(), **options)
    assert loss.dtype == torch.float32
    if impl == "native" and dtype == torch.bfloat16:
        # Products of bfloat16 are exact in float32, so the loss is known as well as the float32 one; the gradient's
        # weights are rounded to bfloat16 (half an eps each), and the gradient itself once more.
        torch.testing.assert_close(loss, wide_loss, rtol=64 * torch.finfo(torch.float32).eps, atol=0)
        for grad, expected in zip(narrow, wide, strict=True):
            assert grad.dtype == dtype
            limit = 1.5 * torch.finfo(dtype).eps * float(expected.norm(dim=1).max())
            assert float((grad.float() - expected).norm(dim=1).max()) <= limit
        return
    assert torch.equal(loss, wide_loss)
    for grad, expected in zip(narrow, wide, strict=True):
        # The only rounding to the narrow dtype is that of the result.
        assert grad.dtype == dtype and torch.equal(grad, expected.to(dtype))


@every_combination
def test_float32_gradients_equal_those_of_float64(relation, penalty, normalize) -> None:
    options = {"relation": relation, "penalty": penalty, "normalize": normalize}
    real, fake = features(8, 16, seed=5, dtype=torch.float32)
    wide = gradients(real.double(), fake.double(), **options)
    for found, expected in zip(gradients(real, fake, **options), wide, strict=True):
        # Distances are of the order of the rows' length, so nothing cancels: some tens of roundings.
        scale = float(expected.abs().max())
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=64 * torch.finfo(torch.float32).eps * scale)


@quick
@given(combination=any_combination, seed=st.integers(0, 999), size=st.integers(2, 7), data=st.data())
def test_the_order_of_samples_does_not_matter(combination, seed, size, data) -> None:
    order = torch.tensor(data.draw(st.permutations(range(size))))
    options: dict[str, Any] = dict(zip(("relation", "penalty", "normalize"), combination, strict=True))
    real, fake = features(size, 4, seed)
    weight, labels = torch.linspace(0.1, 1, size), torch.arange(size) % 2
    expected = gradients(real, fake, weight=weight, labels=labels, **options)
    found = gradients(real[order], fake[order], weight=weight[order], labels=labels[order], **options)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-10, atol=1e-12)
    for grad, other in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(grad, other[order], rtol=1e-8, atol=1e-10)


@quick
@given(combination=any_combination, seed=st.integers(0, 999))
def test_rotations_of_either_feature_space_do_not_matter(combination, seed) -> None:
    options: dict[str, Any] = dict(zip(("relation", "penalty", "normalize"), combination, strict=True))
    real, fake = features(5, 4, seed)
    rotations = [torch.linalg.qr(x)[0] for x in torch.stack(features(4, 4, seed + 1000))]
    expected = structure_loss(real, fake, **options)
    found = structure_loss(real @ rotations[0], fake @ rotations[1], **options)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@quick
@given(relation=st.sampled_from(["euclidean", "gaussian"]), penalty=st.sampled_from(PENALTIES), seed=st.integers(0, 99))
def test_what_each_normalisation_makes_invisible(relation, penalty, seed) -> None:
    real, fake = features(5, 4, seed)
    options = {"relation": relation, "penalty": penalty}
    lengths = torch.rand(5, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.5
    shift = torch.full((4,), 3.0, dtype=torch.float64)
    unit = structure_loss(real, fake, normalize="unit", **options)
    torch.testing.assert_close(structure_loss(real, lengths * fake, normalize="unit", **options), unit)
    mean = structure_loss(real, fake, normalize="mean", **options)
    torch.testing.assert_close(structure_loss(real, 7.0 * fake + shift, normalize="mean", **options), mean)
    none = structure_loss(real, fake, normalize="none", **options)
    torch.testing.assert_close(structure_loss(real + shift, fake - shift, normalize="none", **options), none)


@every_combination
def test_equal_batches_have_no_distance_and_swapping_them_changes_nothing(relation, penalty, normalize) -> None:
    options = {"relation": relation, "penalty": penalty, "normalize": normalize}
    real, fake = features(6, 4)
    loss, grad_real, grad_fake = gradients(real, real, **options)
    assert float(loss) == 0.0 and not grad_real.any() and not grad_fake.any()
    assert float(structure_loss(real, fake, **options)) > 0
    torch.testing.assert_close(structure_loss(fake, real, **options), structure_loss(real, fake, **options))


@every_combination
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equal_and_zero_rows_have_finite_gradients(relation, penalty, normalize, dtype) -> None:
    options = {"relation": relation, "penalty": penalty, "normalize": normalize}
    real, fake = features(6, 4, dtype=dtype)
    real[1], fake[2] = real[0], fake[0]
    real[3], fake[3], fake[4] = 0.0, 0.0, 0.0
    for value in gradients(real, fake, **options):
        assert value.isfinite().all()


@every_combination
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("row", [0.0, 1.7])
def test_a_batch_of_equal_rows_gets_no_gradient(relation, penalty, normalize, dtype, row) -> None:
    real, _ = features(5, 3, dtype=dtype)
    fake = torch.full_like(real, row)
    loss, _, grad_fake = gradients(real, fake, relation=relation, penalty=penalty, normalize=normalize)
    assert loss.isfinite()
    # Cosine similarity is greatest there; its gradient vanishes up to the rounding of the projection off the row.
    limit = 8 * torch.finfo(dtype).eps if relation == "cosine" else 0.0
    assert float(grad_fake.abs().max()) <= limit


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_rows_closer_than_the_rounding_noise_count_as_equal(scale: float) -> None:
    real, fake = (scale * x for x in features(4, 64, dtype=torch.float32))
    fake[1] = fake[0] * (1 + 2e-7)
    matrix = relation_matrix(fake, normalize="none")
    assert matrix[0, 1] == 0 and matrix[1, 0] == 0 and (matrix.diagonal() == 0).all()
    # A thousandth of the length and more is seen.
    fake[1] = fake[0] * (1 + 4e-3)
    assert float(relation_matrix(fake, normalize="none")[0, 1]) == pytest.approx(4e-3 * float(fake[0].norm()), rel=0.1)


@every_combination
@pytest.mark.parametrize("size", [0, 1])
def test_without_pairs_the_loss_is_zero_with_a_zero_gradient(relation, penalty, normalize, size) -> None:
    real, fake = features(size, 3)
    options = {"relation": relation, "penalty": penalty, "normalize": normalize}
    for extra in ({}, {"weight": torch.ones(size)}, {"labels": torch.zeros(size, dtype=torch.int64)}):
        loss, grad_real, grad_fake = gradients(real, fake, **options, **extra)
        assert float(loss) == 0.0
        assert grad_real.shape == (size, 3) and not grad_real.any() and not grad_fake.any()


@every_combination
@pytest.mark.parametrize("side", [0, 1])
def test_a_nan_stays_a_nan(relation, penalty, normalize, side) -> None:
    pair = features(4, 3)
    pair[side][2, 1] = math.nan
    assert structure_loss(*pair, relation=relation, penalty=penalty, normalize=normalize).isnan()


@every_combination
def test_memory_layout_does_not_matter(relation, penalty, normalize) -> None:
    options = {"relation": relation, "penalty": penalty, "normalize": normalize}
    real, fake = features(5, 4)
    expected = gradients(real, fake, **options)
    wide = torch.zeros(4, 10, dtype=torch.float64)
    wide[:, ::2] = fake.T
    strided, transposed = wide[:, ::2].T.requires_grad_(True), real.T.contiguous().T.requires_grad_(True)
    assert not strided.is_contiguous() and not transposed.is_contiguous()
    loss = structure_loss(transposed, strided, **options)
    grads = torch.autograd.grad(
        loss, (transposed, strided), grad_outputs=torch.ones(1, dtype=torch.float64).expand(1)[0]
    )
    for found, value in zip((loss.detach(), *grads), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-12, atol=1e-14)


def test_an_expanded_input_gets_the_sum_of_its_rows_gradients() -> None:
    real, fake = features(4, 3)
    options: dict[str, Any] = {"relation": "gaussian", "normalize": "none"}
    row = fake[:1].clone().requires_grad_(True)
    # One row for all: every generated relation is exp(0) = 1, and moving all rows together changes nothing.
    loss = structure_loss(real, row.expand(4, 3), **options)
    loss.backward()
    torch.testing.assert_close(loss, (1 - relation_matrix(real, **options)).square().sum() / 12, rtol=1e-12, atol=0)
    assert row.grad is not None and not row.grad.any()
    weight = torch.tensor(2.0).expand(4)
    assert torch.equal(structure_loss(real, fake, weight=weight), structure_loss(real, fake))


@every_combination
def test_a_second_backward_through_one_graph_adds_the_same_gradient(relation, penalty, normalize) -> None:
    real, fake = (x.requires_grad_(True) for x in features(5, 3))
    loss = structure_loss(real, fake, relation=relation, penalty=penalty, normalize=normalize)
    first = torch.autograd.grad(loss, (real, fake), retain_graph=True)
    second = torch.autograd.grad(loss, (real, fake), grad_outputs=torch.tensor(-3.0, dtype=torch.float64))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(b, -3.0 * a, rtol=1e-12, atol=1e-14)


@every_combination
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_autocast_changes_nothing(relation, penalty, normalize, dtype) -> None:
    options = {"relation": relation, "penalty": penalty, "normalize": normalize}
    real, fake = features(6, 8, dtype=dtype)
    expected = gradients(real, fake, **options)
    real.requires_grad_(True), fake.requires_grad_(True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = structure_loss(real, fake, **options)
    for found, value in zip((loss.detach(), *torch.autograd.grad(loss, (real, fake))), expected, strict=True):
        assert found.dtype == value.dtype and torch.equal(found, value)


@pytest.mark.parametrize("labels", [torch.uint8, torch.int32, torch.int64, torch.bool])
def test_labels_of_any_integer_type(labels: torch.dtype) -> None:
    real, fake = features(4, 3)
    classes = torch.tensor([0, 1, 1, 0])
    expected = structure_loss(real, fake, labels=classes)
    assert torch.equal(structure_loss(real, fake, labels=classes.to(labels)), expected)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("relation", RELATIONS)
def test_the_loss_is_the_mean_difference_of_the_relation_matrices(relation: str, normalize: str) -> None:
    real, fake = features(6, 4)
    options: dict[str, Any] = {"relation": relation, "normalize": normalize}
    matrices = [relation_matrix(x, **options) for x in (real, fake)]
    for matrix in matrices:
        assert matrix.shape == (6, 6)
        torch.testing.assert_close(matrix, matrix.T)
        diagonal = 0.0 if relation == "euclidean" else 1.0
        torch.testing.assert_close(matrix.diagonal(), torch.full((6,), diagonal, dtype=torch.float64))
    expected = (matrices[1] - matrices[0]).square().sum() / 30
    torch.testing.assert_close(structure_loss(real, fake, **options), expected, rtol=1e-12, atol=0)
