"""The GPU kernels against the definition in float64: in the strict interpreter, and on a GPU where there is one."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

from sadm_kernels import Queue, ops, structure_loss
from sadm_kernels.reference import NORMALIZATIONS, PENALTIES, RELATIONS
from sadm_kernels.samples import Options, Pairs, Samples
from sadm_kernels.triton import distance_sums, few, launch, loss_and_gradients, slope_sums

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TAU, DELTA = 0.8, 0.2


class Place(NamedTuple):
    """Where a test runs, on how many samples and features: neither fills its last tile."""

    device: str
    size: int
    d: int
    shuffle: Callable[[int], None]


@pytest.fixture(params=["strict", pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request, monkeypatch) -> Place:
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        return Place("cuda", 333, 200, lambda seed: None)
    strict = request.getfixturevalue("strict")
    machine = launch.Machine(strict.load(Path(launch.__file__).with_name("device_code.py")), 90)
    monkeypatch.setattr(launch, "machine_of", lambda device: machine)
    # Small tiles make many programs of few samples.
    for kernels in launch.TILES.values():
        for name in kernels:
            monkeypatch.setitem(kernels, name, launch.Tile(16, 16, 32, 32, 4, 3))
    monkeypatch.setattr(launch, "WEIGHT_TILE", launch.Tile(16, 16, 0, 0, 4, 1))
    monkeypatch.setattr(launch, "WEIGH_TILE", launch.Tile(4, 16, 0, 0, 4, 1))
    monkeypatch.setattr(launch, "WEIGH_STEPS", 2)
    monkeypatch.setattr(launch, "FINISH_TILE", launch.Tile(16, 0, 0, 32, 4, 1))
    return Place("cpu", 23, 20, strict.shuffle)


def features(size: int, d: int, dtype: torch.dtype, device: str = "cpu", mean: float = 0.0) -> tuple[Tensor, Tensor]:
    """Rows of length 1 or so, around a point `mean` times as far from the origin as they are from it."""
    generator = torch.Generator().manual_seed(size)
    real, fake = (torch.randn(2, size, d, generator=generator, dtype=torch.float64) + mean) / math.sqrt(d)
    return real.to(device, dtype), fake.to(device, dtype)


def some_weight(size: int, device: str) -> Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(1)).to(device)


def some_labels(size: int, device: str) -> Tensor:
    # Beyond 32 bits, and equal there.
    return (torch.arange(size, device=device) % 3 << 33) + 7


def pairs(
    real: Tensor,
    fake: Tensor,
    *,
    rows: slice = slice(None),
    weight: Tensor | None = None,
    labels: Tensor | None = None,
    **options: str,
) -> Pairs:
    """The pairs of a rank that has `rows` of the batch."""
    own = range(*rows.indices(len(real)))
    return Pairs(Samples(real, fake, weight, labels), own, Options(tau=TAU, delta=DELTA, **options))


def moments_of(parts: list[Pairs], normalize: str) -> Tensor | None:
    """What the caller makes of both passes, over all ranks."""
    if normalize != "mean" or parts[0].options.relation == "cosine":
        return None
    sums = sum(distance_sums(p) for p in parts)
    assert isinstance(sums, Tensor)
    mean = sums[:2] / torch.where(sums[2] == 0, 1.0, sums[2])
    moments = torch.cat([1.0 / torch.where(mean == 0, 1.0, mean), torch.full_like(mean, math.nan)])
    slopes = sum(slope_sums(p, moments) for p in parts)
    assert isinstance(slopes, Tensor)
    moments[2:] = slopes[:2] / torch.where(slopes[2] == 0, 1.0, slopes[2])
    return moments


Result = tuple[Tensor, Tensor, Tensor]  # loss, gradients of real and fake


def fused(real: Tensor, fake: Tensor, **options: Any) -> Result:
    p = pairs(real, fake, **options)
    sums, grad_real, grad_fake = loss_and_gradients(p, moments_of([p], options.get("normalize", "unit")), True, True)
    assert sums.dtype == torch.float64 and sums.shape == (2,)
    assert grad_real is not None and grad_fake is not None
    assert grad_real.dtype == grad_fake.dtype == torch.float32
    total = torch.where(sums[1] == 0, 1.0, sums[1])
    return sums[0] / total, grad_real / total, grad_fake / total


def by_definition(real: Tensor, fake: Tensor, dtype: torch.dtype, **options: Any) -> Result:
    real, fake = (x.detach().to(dtype).requires_grad_(True) for x in (real, fake))
    loss = structure_loss(real, fake, tau=TAU, delta=DELTA, impl="reference", **options)
    grad_real, grad_fake = torch.autograd.grad(loss, (real, fake))
    return loss.detach().double(), grad_real.double(), grad_fake.double()


def assert_as_exact_as_eager(real: Tensor, fake: Tensor, found: Result, *, mean: float = 0.0, **options: Any) -> None:
    """Largest errors against float64, beside those of the reference in float32 on the same features."""
    exact = by_definition(real, fake, torch.float64, **options)
    eager = by_definition(real, fake, torch.float32, **options)
    # The three tf32 products leave 22 of a factor's 24 bits, hence 4 times eager's rounding, and ten or so roundings
    # of the epilogue, at a magnitude of the largest value: 8 eps, for an eager error that happens to be none. Both
    # grow with ||a||^2 + ||b||^2 over ||a - b||^2, which is 1 + mean^2 (see features).
    # Gradients of narrow features sum pulls rounded to that dtype, as the result will be: one eps of it.
    # Their products are exact, but tensor cores cut sums off where eager code rounds: each step of 16 features takes
    # up to 1 + 16/4 units of the last place of the sum so far (see strict_interpreter._accumulated), always towards
    # zero. The sum of squares grows evenly, so |x|^2 is up to 5 eps (steps + 1) / 2 too small, and with it S of
    # distances that are not normalised.
    # A gradient that is stored as float16 is rounded to a multiple of 2^-24, its smallest number.
    narrow = 0.0 if real.dtype == FP32 else torch.finfo(real.dtype).eps
    cut = 0.0 if real.dtype == FP32 else 2.5 * (math.ceil(real.shape[1] / 16) + 1) * torch.finfo(FP32).eps
    for name, value, expected, other, unit in zip(
        ("loss", "real", "fake"), found, exact, eager, (cut, narrow, narrow), strict=True
    ):
        scale = float(expected.abs().max())
        rounding = 8 * torch.finfo(FP32).eps * (1 + mean**2)
        allowed = 4 * float((other - expected).abs().max()) + (rounding + unit) * scale
        allowed += 2.0**-25 if value.dtype == FP16 else 0.0
        assert float((value - expected).abs().max()) <= allowed, name


# Every dtype with every relation and with every normalisation.
a_dtype_each = pytest.mark.parametrize(
    ("relation", "normalize", "dtype"),
    [
        (RELATIONS[r], NORMALIZATIONS[n], (BF16, FP16, FP32)[(r + n) % 3])
        for r, n in itertools.product(range(3), repeat=2)
    ],
)


# Weights and labels meet every relation, every penalty and every normalisation, with and without each other.
@pytest.mark.parametrize(
    ("relation", "penalty", "normalize", "weighted", "labelled"),
    [
        (RELATIONS[r], PENALTIES[p], NORMALIZATIONS[n], (r + p + n) % 4 in (1, 2), (r + p + n) % 4 in (2, 3))
        for r, p, n in itertools.product(range(3), repeat=3)
    ],
)
def test_every_combination(place, relation, penalty, normalize, weighted, labelled) -> None:
    real, fake = features(place.size, place.d, BF16, place.device)
    options = {
        "relation": relation,
        "penalty": penalty,
        "normalize": normalize,
        "weight": some_weight(place.size, place.device) if weighted else None,
        "labels": some_labels(place.size, place.device) if labelled else None,
    }
    assert_as_exact_as_eager(real, fake, fused(real, fake, **options), **options)


# In `make test` each dtype meets each relation and each normalisation; all three together, in `make test-faults`.
@pytest.mark.parametrize(
    ("dtype", "relation", "normalize"),
    [
        pytest.param((FP32, FP16)[k], RELATIONS[r], NORMALIZATIONS[n], marks=[pytest.mark.soak] * ((k + r + n) % 2))
        for k, r, n in itertools.product(range(2), range(3), range(3))
    ],
)
def test_every_dtype(place, dtype, relation, normalize) -> None:
    # Chunks of d of which the last is not full, and steps of the products alike.
    real, fake = features(place.size, 2 * place.d, dtype, place.device)
    options = {"relation": relation, "normalize": normalize, "weight": some_weight(place.size, place.device)}
    assert_as_exact_as_eager(real, fake, fused(real, fake, **options), **options)


def through_ops(real: Tensor, fake: Tensor, queue: Queue | None = None, **options: Any) -> Tensor:
    """What the public function calls on a GPU, for more rows than a micro-batch has."""
    batch = Samples(real, fake, options.pop("weight", None), options.pop("labels", None))
    with mock.patch.object(few, "ROWS", 0):
        return ops.structure_loss("triton", batch, Options(tau=TAU, delta=DELTA, **options), queue=queue)


@pytest.mark.parametrize("strips", [False, True])
@pytest.mark.parametrize(("relation", "normalize"), [("euclidean", "unit"), ("cosine", "none"), ("gaussian", "mean")])
def test_with_a_queue(place, monkeypatch, relation, normalize, strips) -> None:
    """Rows of the batch against its own columns and those of the past, in one matrix."""
    monkeypatch.setattr(launch, "STRIPS_FROM", 0 if strips else 10**9)
    real, fake = (x.requires_grad_(True) for x in features(place.size, place.d, BF16, place.device))
    past = features(2 * place.size + 1, place.d, BF16, place.device)
    rows = len(past[0])
    queue = Queue(*past, some_weight(rows, place.device), some_labels(rows, place.device))
    options = {"relation": relation, "normalize": normalize, "labels": some_labels(place.size, place.device)}
    loss = through_ops(real, fake, queue, **options)
    grad_real, grad_fake = torch.autograd.grad(loss, (real, fake))
    assert_as_exact_as_eager(real, fake, (loss.detach(), grad_real, grad_fake), **options, queue=queue)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_where_no_pair_counts_loss_and_gradients_are_zero(place, dtype) -> None:
    real, fake = (x.requires_grad_(True) for x in features(place.size, place.d, dtype, place.device))
    one = (torch.arange(place.size, device=place.device) == 1).float()
    for weight, labels in ((None, torch.arange(place.size, device=place.device)), (one, None)):
        loss = through_ops(real, fake, normalize="mean", weight=weight, labels=labels)
        assert not loss.any() and not any(grad.any() for grad in torch.autograd.grad(loss, (real, fake)))


def test_only_ratios_of_weights_count(place) -> None:
    real, fake = (x.requires_grad_(True) for x in features(place.size, place.d, BF16, place.device))
    weight = some_weight(place.size, place.device)
    losses = [through_ops(real, fake, weight=weight * 2.0**exponent) for exponent in (0, -100, 100)]
    grads = [torch.autograd.grad(loss, (real, fake)) for loss in losses]
    for loss, grad in zip(losses[1:], grads[1:], strict=True):
        assert torch.equal(loss, losses[0]) and all(map(torch.equal, grad, grads[0]))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("relation", RELATIONS)
def test_through_the_operator(place, relation, compiled) -> None:
    real, fake = (x.requires_grad_(True) for x in features(place.size, place.d, BF16, place.device))
    options = {"relation": relation, "penalty": "huber", "normalize": "mean"}
    rest: dict[str, Any] = {"weight": some_weight(place.size, place.device), "labels": None}
    if compiled:
        no_queue = (None,) * 4
        arguments = (
            *rest.values(),
            *no_queue,
            *options.values(),
            torch.tensor(TAU),
            torch.tensor(DELTA),
            "triton",
            True,
            True,
        )
        loss = torch.ops.sadm_kernels.structure_loss(real, fake, *arguments)[0]
    else:
        loss = through_ops(real, fake, **rest, **options)
    grad_real, grad_fake = torch.autograd.grad(loss, (real, fake))
    assert loss.dtype == FP32 and grad_real.dtype == grad_fake.dtype == BF16
    assert_as_exact_as_eager(real, fake, (loss.detach(), grad_real, grad_fake), **options, weight=rest["weight"])


@a_dtype_each
def test_the_loss_alone_is_that_of_the_gradients(place, dtype, relation, normalize) -> None:
    real, fake = features(place.size, place.d, dtype, place.device)
    options = {"relation": relation, "normalize": normalize, "weight": some_weight(place.size, place.device)}
    p = pairs(real, fake, **options)
    moments = moments_of([p], normalize)
    alone, *nothing = loss_and_gradients(p, moments, False, False)
    assert nothing == [None, None]
    # The same terms, added up in another order: at most one rounding for each of a row's or tile's partial sums.
    together = loss_and_gradients(p, moments, True, True)[0]
    torch.testing.assert_close(alone, together, rtol=16 * torch.finfo(FP32).eps, atol=0)


@pytest.mark.parametrize("strips", [False, True])
@pytest.mark.parametrize("normalize", ["unit", "mean"])
def test_a_gradient_does_not_depend_on_the_other_one_being_asked_for(place, monkeypatch, normalize, strips) -> None:
    monkeypatch.setattr(launch, "STRIPS_FROM", 0 if strips else 10**9)
    real, fake = features(place.size, place.d, BF16, place.device)
    p = pairs(real, fake, normalize=normalize)
    moments = moments_of([p], normalize)
    both = loss_and_gradients(p, moments, True, True)
    only_real, only_fake = loss_and_gradients(p, moments, True, False), loss_and_gradients(p, moments, False, True)
    assert only_real[2] is None and only_fake[1] is None
    for found, expected in ((only_real[1], both[1]), (only_fake[2], both[2])):
        assert found is not None and expected is not None and torch.equal(found, expected)
    assert torch.equal(only_real[0], both[0]) and torch.equal(only_fake[0], both[0])


@a_dtype_each
def test_strips_give_what_rows_give(place, monkeypatch, relation, normalize, dtype) -> None:
    dtype = BF16 if dtype == FP16 else dtype
    real, fake = features(place.size, place.d, dtype, place.device)
    options = {"relation": relation, "normalize": normalize, "weight": some_weight(place.size, place.device)}
    rows = fused(real, fake, **options)
    monkeypatch.setattr(launch, "STRIPS_FROM", 0)
    height = 16 if place.device == "cpu" else 128
    monkeypatch.setattr(launch, "strip_height", lambda b, n: height)
    strips = fused(real, fake, **options)
    # W is rounded alike, and all sums are float32: they differ by the order of some hundred additions.
    for found, expected in zip(strips, rows, strict=True):
        scale = float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=0, atol=64 * torch.finfo(FP32).eps * scale)
    assert_as_exact_as_eager(real, fake, strips, **options)


@pytest.mark.parametrize("strips", [False, True])
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_the_ranks_of_a_group_share_the_work(place, monkeypatch, normalize, strips) -> None:
    monkeypatch.setattr(launch, "STRIPS_FROM", 0 if strips else 10**9)
    size = place.size // 3 * 3
    real, fake = features(size, place.d, BF16, place.device)
    options = {"normalize": normalize, "weight": some_weight(size, place.device)}
    options |= {"labels": some_labels(size, place.device)}
    whole = pairs(real, fake, **options)
    ranks = [pairs(real, fake, rows=slice(i, i + size // 3), **options) for i in range(0, size, size // 3)]
    moments = moments_of([whole], normalize)
    eps = torch.finfo(FP32).eps
    if moments is not None:
        found = moments_of(ranks, normalize)
        assert found is not None
        torch.testing.assert_close(found[:2], moments[:2], rtol=16 * eps, atol=0)
        # kappa is a mean of Q u, where Q = 2 (u_G - u_F) and u = D/m is near 1: what one last bit of 1/m does to u, it
        # does to Q as well, though Q and its mean be small. An error of eps in each u is 4 eps in Q u.
        torch.testing.assert_close(found[2:], moments[2:], rtol=0, atol=4 * 16 * eps)
    expected = loss_and_gradients(whole, moments, True, True)
    parts = [loss_and_gradients(p, moments, True, True) for p in ranks]
    losses = [loss_and_gradients(p, moments, False, False)[0] for p in ranks]
    for sums in (torch.stack([part[0] for part in parts]).sum(0), torch.stack(losses).sum(0)):
        torch.testing.assert_close(sums, expected[0], rtol=16 * eps, atol=0)
    for side in (1, 2):
        gradients = [part[side] for part in parts]
        assert all(g is not None and g.shape == (size // 3, place.d) for g in gradients)
        # Every row meets the columns in the same order; a GEMM may choose another one for fewer rows.
        scale = float(expected[side].abs().max())  # type: ignore[union-attr]
        torch.testing.assert_close(torch.cat(gradients), expected[side], rtol=0, atol=16 * eps * scale)  # type: ignore[arg-type]


@a_dtype_each
def test_equal_rows_rows_of_zeros_and_ties(place, dtype, relation, normalize) -> None:
    real, fake = features(place.size, place.d, dtype, place.device)
    real[1], fake[2] = real[0], fake[0]
    real[3], fake[3], fake[4] = 0.0, 0.0, 0.0
    fake[6:9] = real[6:9]  # pairs without a difference
    options = {"relation": relation, "penalty": "absolute", "normalize": normalize}
    found = fused(real, fake, **options)
    # Which sign |x| takes where rounding decides is not the point here.
    assert all(x.isfinite().all() for x in found)
    if relation == "cosine" or normalize == "unit":
        assert not found[1][3].any() and not found[2][3:5].any()
    options["penalty"] = "squared"
    assert_as_exact_as_eager(real, fake, fused(real, fake, **options), **options)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_a_batch_of_equal_rows_has_no_distances_and_no_gradient(place, dtype) -> None:
    real, fake = features(place.size, place.d, dtype, place.device)
    fake[:] = fake[0]
    sums = distance_sums(pairs(real, fake, normalize="none"))
    assert sums[0] > 0 and sums[1] == 0
    assert not fused(real, fake, normalize="none")[2].any()


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("part", ["real", "fake", "weight"])
def test_a_nan_reaches_the_loss(place, relation, part) -> None:
    real, fake = features(place.size, place.d, BF16, place.device)
    weight = torch.ones(place.size, device=place.device)
    {"real": real[2], "fake": fake[-1], "weight": weight}[part][1] = math.nan
    p = pairs(real, fake, relation=relation, normalize="none", weight=weight)
    for need in (False, True):
        assert loss_and_gradients(p, None, need, need)[0][0].isnan()
    assert relation == "cosine" or distance_sums(p)[2 if part == "weight" else ("real", "fake").index(part)].isnan()


@pytest.mark.parametrize("mean", [3.0, 10.0])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_features_far_from_the_origin(place, dtype, mean) -> None:
    real, fake = features(place.size, place.d, dtype, place.device, mean)
    for normalize in ("unit", "none"):
        assert_as_exact_as_eager(real, fake, fused(real, fake, normalize=normalize), mean=mean, normalize=normalize)


@pytest.mark.parametrize("strips", [False, True])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_rounding_leaves_what_nothing_may_move(place, monkeypatch, dtype, strips) -> None:
    """Distances do not see the batch as a whole move, nor a row of unit length grow, however pulls are rounded."""
    monkeypatch.setattr(launch, "STRIPS_FROM", 0 if strips else 10**9)
    mean = 10.0
    real, fake = features(place.size, place.d, dtype, place.device, mean)
    grad = fused(real, fake, normalize="none")[2].double()
    # float32 sums of `size` terms as large as features times pulls, which make gradients of features' differences.
    rounding = place.size * torch.finfo(FP32).eps * (1 + mean)
    if dtype != FP16:  # whose powers of two differ between (i, j) and (j, i)
        assert float(grad.sum(0).abs().max()) <= rounding * float(grad.abs().sum(0).max())
    grad = fused(real, fake, normalize="unit")[2].double()
    along = (grad * fake.double()).sum(1).abs()
    assert float((along / (grad.norm(dim=1) * fake.double().norm(dim=1))).max()) <= rounding


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize(("relation", "penalty"), list(zip(RELATIONS, PENALTIES, strict=True)))
def test_equal_batches_have_no_difference_and_no_gradient(place, relation, penalty, normalize) -> None:
    real, _ = features(place.size, place.d, BF16, place.device)
    for value in fused(real, real.clone(), relation=relation, penalty=penalty, normalize=normalize):
        assert not value.any()


@pytest.mark.parametrize("scale", [1e-3, 1e3])
@pytest.mark.parametrize("normalize", ["unit", "none"])
def test_float16_features_may_have_any_scale_and_weights_of_any_size(place, normalize, scale) -> None:
    real, fake = (scale * x for x in features(place.size, place.d, FP16, place.device))
    weight = 1e-6 * some_weight(place.size, place.device)
    options = {"normalize": normalize, "weight": weight}
    assert_as_exact_as_eager(real, fake, fused(real, fake, **options), **options)


def test_one_sample_and_one_feature(place) -> None:
    one = torch.ones(1, 1, dtype=BF16, device=place.device)
    p = pairs(one, 2 * one, normalize="none", weight=torch.ones(1, device=place.device))
    assert distance_sums(p).tolist() == [0.0, 0.0, 0.0]
    sums, grad_real, grad_fake = loss_and_gradients(p, None, True, True)
    assert sums.tolist() == [0.0, 0.0]
    assert grad_real is not None and grad_real.tolist() == [[0.0]]
    assert grad_fake is not None and grad_fake.tolist() == [[0.0]]


@pytest.mark.parametrize("strips", [False, True])
def test_results_are_the_same_bits_each_time(place, monkeypatch, strips) -> None:
    """In whatever order the programs run."""
    monkeypatch.setattr(launch, "STRIPS_FROM", 0 if strips else 10**9)
    real, fake = features(place.size, place.d, BF16, place.device)
    options = {"normalize": "mean", "weight": some_weight(place.size, place.device)}
    expected = fused(real, fake, **options)
    for seed in (1, 2):
        place.shuffle(seed)
        assert all(torch.equal(a, b) for a, b in zip(fused(real, fake, **options), expected, strict=True))


def test_what_cannot_run_says_what_can() -> None:
    real, fake = features(4, 3, torch.float64)
    with pytest.raises(RuntimeError, match=r"float64, must be .* use impl='reference'"):
        loss_and_gradients(pairs(real, fake), None, True, True)
    with pytest.raises(RuntimeError, match=r"on cpu, must be on a CUDA device; use impl='reference'"):
        distance_sums(pairs(real.float(), fake.float()))
    large = torch.empty(2**20, 2047, dtype=BF16, device="meta")
    with pytest.raises(
        RuntimeError, match=r"1048576 x 2048 features, must be fewer than 2\^31 .* use impl='reference'"
    ):
        loss_and_gradients(pairs(large, large), None, True, True)


def test_the_table_fits_the_kernels() -> None:
    for generation, kernels in launch.TILES.items():
        for (name, element_size), tile in kernels.items():
            # Triangles are made of squares; matrix instructions want 16 of everything.
            assert name != "sums" or tile.m == tile.n
            assert min(tile.m, tile.n, tile.k) >= 16 and element_size in (2, 4)
        assert set(kernels) == set(launch.TILES[80]), generation
    assert launch.tile_of("rows", 2, 512, 90) == launch.TILES[90]["rows", 2]
    assert launch.tile_of("rows", 2, 512, 103) == launch.TILES[100]["rows", 2]
    # Neither has the shared memory of its neighbours.
    assert launch.tile_of("rows", 2, 512, 89) == launch.tile_of("rows", 2, 512, 120) == launch.TILES[80]["rows", 2]
    small = launch.tile_of("rows", 2, 48, 90)
    assert (small.k, small.d) == (64, 64) and launch.tile_of("rows", 2, 16, 90).k == 16


@pytest.mark.parametrize(("b", "n"), [(600, 700), (2048, 2048), (16384, 16384), (2048, 10**6), (100_000, 100_000)])
def test_strips_are_small(b: int, n: int) -> None:
    height = launch.strip_height(b, n)
    assert height == b or height % 128 == 0
    assert height == 128 or height * n <= launch.STRIP_ELEMENTS


@pytest.mark.parametrize("d", [16, 40])
def test_six_products_of_bfloat16_parts_are_a_product_of_float32(d: int) -> None:
    """What is left out is below 2^-24 of the factors' lengths; a strip's parts count as often as the features'."""
    generator = torch.Generator().manual_seed(d)
    x = torch.randn(37, d, generator=generator)
    operands = launch._Operands.of(x)
    assert operands.left.dtype == operands.right.dtype == BF16 and operands.right.shape == (48, 6 * d)
    exact = x.double() @ x.double().T
    lengths = x.double().norm(dim=1)
    allowed = 2.0**-22 * lengths[:, None] * lengths[None, :]
    assert bool(((operands.dots(0, 37)[:, :37] - exact).abs() <= allowed).all())
    assert bool(((operands.squares() - exact.diagonal()).abs() <= allowed.diagonal()).all())
    v = torch.randn(5, 37, generator=generator)
    parts = torch.empty(5, 3, 37, dtype=BF16)
    rest = v
    for place in (2, 1, 0):  # the least first
        parts[:, place] = rest
        rest = rest - parts[:, place]
    assert not rest.any()
    allowed = 2.0**-21 * v.double().norm(dim=1)[:, None] * x.double().norm(dim=0)[None, :]
    assert bool(((operands.times(parts) - v.double() @ x.double()).abs() <= allowed).all())


def test_why_missing_is_one_line() -> None:
    from sadm_kernels.triton import why_missing

    reason = why_missing()
    assert reason and "\n" not in reason
    assert torch.cuda.is_available() or reason != "ok"


@pytest.mark.parametrize("relation", ["euclidean", "gaussian"])
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_a_mean_of_a_thousand_standard_deviations_costs_float32_little(place: Place, relation: str, normalize: str):
    real, fake = features(place.size, place.d, FP32, place.device, mean=1000.0)
    options = {"relation": relation, "normalize": normalize}
    # Rows of length 1 are rounded to eps, which is a thousand times as much of their differences.
    mean = math.sqrt(1000.0) if normalize == "unit" else 0.0
    assert_as_exact_as_eager(real, fake, fused(real, fake, **options), mean=mean, **options)


def test_rows_of_length_1_may_have_had_any_length(place: Place):
    real, fake = features(place.size, place.d, FP32, place.device)
    loss, grad_real, grad_fake = fused(real, fake)
    factor = 2.0**66  # exact, and its square is beyond float32
    again, of_real, of_fake = fused(real * factor, fake / factor)
    assert torch.equal(again, loss)
    assert torch.equal(of_real * factor, grad_real) and torch.equal(of_fake / factor, grad_fake)


def test_rows_of_one_direction_are_one_point(place: Place):
    real, _ = features(place.size, place.d, FP32, place.device)
    lengths = torch.linspace(0.5, 3.0, place.size, device=place.device)[:, None]
    fake = lengths * real[:1]  # of length 1 they differ by rounding
    loss, _, grad_fake = fused(real, fake)
    expected, _, of_fake = by_definition(real, fake, FP32)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert torch.equal(grad_fake.double(), torch.zeros_like(grad_fake).double()) and not of_fake.any()
