"""The structure loss with a queue of past samples: against two nested loops, differences, and the definition."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sadm_kernels import Queue, StructureLoss, backends, structure_loss
from sadm_kernels.capabilities import FUSED
from sadm_kernels.ops import _structure_loss
from sadm_kernels.reference import NORMALIZATIONS, PENALTIES

RELATIONS = FUSED["native"].relation  # one that only the reference knows has tests of its own

every_combination = pytest.mark.parametrize(
    ("relation", "penalty", "normalize"), list(itertools.product(RELATIONS, PENALTIES, NORMALIZATIONS))
)
needs_kernel = pytest.mark.skipif(backends()["native"] != "ok", reason=backends()["native"])
implementations = pytest.mark.parametrize(
    "impl", ["reference", pytest.param("native", marks=needs_kernel)]
)  # the Triton kernels have triton/test_device_code.py
SHAPES: dict[str, Any] = {"tau": 0.8, "delta": 0.2}


def samples(
    size: int, d: int, seed: int, *, weighted: bool = True, labelled: bool = True, dtype: torch.dtype = torch.float64
) -> Queue:
    """As many samples as a batch or a queue has: features, weights, labels."""
    generator = torch.Generator().manual_seed(seed)
    real, fake = torch.randn(2, size, d, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.rand(size, generator=generator, dtype=torch.float64) + 0.1 if weighted else None
    return Queue(real.clone(), fake.clone(), weight, torch.arange(size) % 2 if labelled else None)


def loss_of(batch: Queue, queue: Queue | None, **options: Any) -> Tensor:
    real, fake, weight, labels = batch
    return structure_loss(real, fake, weight=weight, labels=labels, queue=queue, **options)


def evaluate(batch: Queue, queue: Queue | None, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, and the gradients of real and fake."""
    real, fake = (x.detach().clone().requires_grad_(True) for x in batch[:2])
    loss = loss_of(batch._replace(real=real, fake=fake), queue, **options)
    grad_real, grad_fake = torch.autograd.grad(loss, (real, fake))
    return loss.detach(), grad_real, grad_fake


def brute_force(batch: Queue, queue: Queue, *, relation: str, penalty: str, normalize: str) -> float:
    """S in Python floats: two loops over all samples, less the pairs that are both of the past."""
    size = len(batch.real)
    everything = [
        None if now is None or past is None else torch.cat([now, past]).tolist()
        for now, past in zip(batch, queue, strict=True)
    ]
    real, fake, weight, labels = everything
    assert real is not None and fake is not None
    pairs = {
        (i, j): 1.0 if weight is None else weight[i] * weight[j]
        for i in range(len(real))
        for j in range(len(real))
        if i != j and (i < size or j < size) and (labels is None or labels[i] == labels[j])
    }
    total = sum(pairs.values())
    if not total:
        return 0.0

    def relations(rows: list[list[float]]) -> dict[tuple[int, int], float]:
        if relation == "cosine" or normalize == "unit":
            rows = [[x / math.hypot(*row) for x in row] for row in rows]
        if relation == "cosine":
            return {(i, j): sum(a * b for a, b in zip(rows[i], rows[j], strict=True)) for i, j in pairs}
        found = {(i, j): math.dist(rows[i], rows[j]) for i, j in pairs}
        if normalize == "mean":
            mean = sum(w * found[pair] for pair, w in pairs.items()) / total
            found = {pair: distance / mean for pair, distance in found.items()}
        if relation == "gaussian":
            return {pair: math.exp(-(distance**2) / (2 * SHAPES["tau"] ** 2)) for pair, distance in found.items()}
        return found

    def rho(x: float) -> float:
        if penalty == "squared":
            return x * x
        if penalty == "absolute":
            return abs(x)
        delta = SHAPES["delta"]
        return x * x / 2 if abs(x) <= delta else delta * (abs(x) - delta / 2)

    of_real, of_fake = relations(real), relations(fake)
    return sum(w * rho(of_fake[pair] - of_real[pair]) for pair, w in pairs.items()) / total


@implementations
@every_combination
@pytest.mark.parametrize(("weighted", "labelled"), [(False, False), (True, True)])
@pytest.mark.parametrize("size", [1, 5])
def test_equals_two_nested_loops(impl, relation, penalty, normalize, weighted, labelled, size) -> None:
    options = {"relation": relation, "penalty": penalty, "normalize": normalize}
    batch, queue = (samples(n, 3, n, weighted=weighted, labelled=labelled) for n in (size, 6))
    found = float(loss_of(batch, queue, impl=impl, **options, **SHAPES))
    # Some tens of float64 terms; the closest of these points are 0.05 apart, whose distance is good to 1e-13.
    assert found == pytest.approx(brute_force(batch, queue, **options), rel=1e-11)


@implementations
@every_combination
def test_gradients_equal_finite_differences(impl, relation, penalty, normalize) -> None:
    batch, queue = samples(4, 2, 3), samples(5, 2, 4)

    def loss(real: Tensor, fake: Tensor) -> Tensor:
        now = batch._replace(real=real, fake=fake)
        return loss_of(now, queue, relation=relation, penalty=penalty, normalize=normalize, impl=impl, **SHAPES)

    assert torch.autograd.gradcheck(loss, tuple(x.requires_grad_(True) for x in batch[:2]))


@needs_kernel
@settings(deadline=None, max_examples=40)
@given(
    size=st.integers(1, 150),
    past=st.integers(0, 300),
    d=st.integers(4, 70),
    relation=st.sampled_from(RELATIONS),
    penalty=st.sampled_from(PENALTIES),
    normalize=st.sampled_from(NORMALIZATIONS),
    weighted=st.booleans(),
    labelled=st.booleans(),
)
def test_the_kernel_equals_the_definition_at_any_shape(
    size, past, d, relation, penalty, normalize, weighted, labelled
) -> None:
    assume(size + past > 1)
    batch, queue = (samples(n, d, seed, weighted=weighted, labelled=labelled) for n, seed in ((size, 1), (past, 2)))
    options: dict[str, Any] = {"relation": relation, "penalty": penalty, "normalize": normalize, "delta": 0.3}
    options["tau"] = 1.0 if normalize != "none" else d**0.5
    expected = evaluate(batch, queue, impl="reference", **options)
    for found, value in zip(evaluate(batch, queue, impl="native", **options), expected, strict=True):
        # float64 sums of up to 450 terms of both signs, in another order.
        torch.testing.assert_close(found, value, rtol=1e-8, atol=1e-11)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_queue_takes_the_dtype_of_the_batch(dtype: torch.dtype) -> None:
    batch, queue = samples(40, 16, 1, dtype=dtype), samples(90, 16, 2, dtype=dtype)
    stored = queue._replace(real=queue.real.float(), fake=queue.fake.float())  # as a trainer keeps it: nothing is lost
    expected = evaluate(batch, queue, impl="native")
    for found, value in zip(evaluate(batch, stored, impl="native"), expected, strict=True):
        assert found.dtype == value.dtype and torch.equal(found, value)
    exact = evaluate(*(x._replace(real=x.real.double(), fake=x.fake.double()) for x in (batch, queue)))
    # As without a queue: float32 sums, one rounding of the weights and one of the gradient to the narrow dtype.
    units = [64 * 2.0**-23, *[64 * 2.0**-23 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps] * 2]
    for found, value, unit in zip(expected, exact, units, strict=True):
        assert float((found.double() - value).norm() / value.norm()) < unit


@implementations
def test_an_empty_queue_is_none(impl: str) -> None:
    batch, empty = samples(6, 3, 1), samples(0, 3, 2)
    for found, value in zip(evaluate(batch, empty, impl=impl), evaluate(batch, None, impl=impl), strict=True):
        assert torch.equal(found, value)
    alone = samples(1, 3, 1)
    assert all(not x.any() for x in evaluate(alone, empty, impl=impl))


@implementations
def test_a_missing_weight_counts_as_one(impl: str) -> None:
    batch, queue = samples(4, 3, 1), samples(5, 3, 2)
    for without, ones in (
        ((batch._replace(weight=None), queue), (batch._replace(weight=torch.ones(4)), queue)),
        ((batch, queue._replace(weight=None)), (batch, queue._replace(weight=torch.ones(5)))),
    ):
        for found, value in zip(evaluate(*without, impl=impl), evaluate(*ones, impl=impl), strict=True):
            assert torch.equal(found, value)


@implementations
@pytest.mark.parametrize("part", ["real", "fake"])
def test_a_nan_in_the_queue_stays_a_nan(impl: str, part: str) -> None:
    batch, queue = samples(4, 3, 1), samples(5, 3, 2)
    getattr(queue, part).view(-1)[3] = math.nan
    assert loss_of(batch, queue, impl=impl).isnan()


@implementations
def test_labels_of_different_integer_types_are_compared_as_numbers(impl: str) -> None:
    batch, queue = samples(4, 3, 1), samples(5, 3, 2)
    expected = loss_of(batch, queue._replace(labels=torch.tensor([0, 1, 2, 2, 1])), impl=impl)
    narrow = batch._replace(labels=torch.arange(4).to(torch.uint8) % 2)
    wide = queue._replace(labels=torch.tensor([0, 1, 256, 257, 1]))  # 0 and 1 again in eight bits
    assert torch.equal(loss_of(narrow, wide, impl=impl), expected)


def test_the_queue_gets_no_gradient_and_is_left_alone() -> None:
    batch, queue = samples(4, 3, 1), samples(5, 3, 2)
    before = [x.clone() for x in queue if x is not None]
    evaluate(batch, queue)
    assert all(torch.equal(a, b) for a, b in zip(queue, before, strict=True) if a is not None)
    assert not any(x.requires_grad for x in queue if x is not None)


REAL, FAKE = torch.randn(2, 4, 3)
PAST = torch.randn(5, 3)


@pytest.mark.parametrize(
    ("queue", "message"),
    [
        (Queue(PAST[:4], PAST), r"queue.real.shape=\(4, 3\) but queue.fake.shape=\(5, 3\)"),
        (Queue(PAST[0], PAST[0]), r"queue.real.shape=\(3,\): must be \[B, d\]"),
        (Queue(PAST.long(), PAST.long()), "queue.real.dtype=torch.int64: must be float16"),
        (Queue(PAST[:, :2], PAST[:, :2]), r"queue.real.shape=\(5, 2\): must be \[q, 3\], as wide as real"),
        (Queue(PAST.to("meta"), PAST.to("meta")), "queue.real.device=meta: must be cpu"),
        (Queue(PAST, PAST.clone().requires_grad_(True)), "queue.fake.requires_grad=True: .* queue.fake.detach()"),
        (Queue(PAST, PAST, torch.ones(4)), r"queue.weight.shape=\(4,\): must be \[5\]"),
        (Queue(PAST, PAST, -torch.ones(5)), "queue.weight: has -1.0, must not be negative"),
        (Queue(PAST, PAST, None, torch.zeros(5).long()), "labels=None: must be given with queue.labels, or neither"),
    ],
)
def test_a_bad_queue_is_named_with_its_value(queue: Queue, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        structure_loss(REAL, FAKE, queue=queue)


def test_a_queue_without_labels_for_a_batch_with_labels_is_refused() -> None:
    labels = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="queue.labels=None: must be given with labels, or neither"):
        structure_loss(REAL, FAKE, labels=labels, queue=Queue(PAST, PAST))
    with pytest.raises(ValueError, match="queue.labels.dtype=torch.float32: must be an integer type"):
        structure_loss(REAL, FAKE, labels=labels, queue=Queue(PAST, PAST, None, torch.zeros(5)))


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_passes_opcheck(dtype: torch.dtype) -> None:
    batch, queue = samples(20, 8, 1, dtype=dtype), samples(30, 8, 2)
    for now in batch[:2]:
        now.requires_grad_(True)
    options = ("gaussian", "huber", "mean", torch.tensor(0.8), torch.tensor(0.2), "native", True, True)
    result = torch.library.opcheck(_structure_loss, (*batch, *queue, *options))
    assert set(result.values()) == {"SUCCESS"}


@needs_kernel
def test_a_module_with_it_compiles_without_a_graph_break() -> None:
    module = StructureLoss(normalize="mean")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    batch, queue = samples(20, 8, 1, dtype=torch.float32), samples(30, 8, 2)
    results = []
    for call in (module, compiled):
        fake = batch.fake.clone().requires_grad_(True)
        loss = call(batch.real, fake, batch.weight, batch.labels, queue)
        results.append((loss.detach(), *torch.autograd.grad(loss, fake)))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


@needs_kernel
def test_fake_tensors_go_through_without_memory_behind_them() -> None:
    with FakeTensorMode():
        real, fake = torch.empty(2, 20, 8)
        queue = Queue(torch.empty(30, 8), torch.empty(30, 8))
        (grad,) = torch.autograd.grad(structure_loss(real, fake.requires_grad_(True), queue=queue), fake)
    assert grad.shape == (20, 8)
