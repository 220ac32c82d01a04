"""Features of two networks: real and fake differ in width and dtype, as a teacher's and a student's do."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sadm_kernels import Queue, backends, structure_loss
from sadm_kernels.capabilities import FUSED
from sadm_kernels.reference import NORMALIZATIONS

RELATIONS = FUSED["native"].relation  # one that only the reference knows has tests of its own

needs_kernel = pytest.mark.skipif(backends()["native"] != "ok", reason=backends()["native"])
implementations = pytest.mark.parametrize("impl", ["reference", pytest.param("native", marks=needs_kernel)])
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def unlike(size: int, widths: tuple[int, int], dtypes: tuple[torch.dtype, torch.dtype], seed: int = 0) -> Queue:
    """Samples whose values every dtype has exactly, so that a conversion changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    real, fake = (
        (torch.randint(-64, 65, (size, width), generator=generator) / 32).to(dtype)
        for width, dtype in zip(widths, dtypes, strict=True)
    )
    return Queue(real, fake, torch.rand(size, generator=generator) + 0.1, torch.arange(size) % 2)


def evaluate(batch: Queue, queue: Queue | None, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, and the gradients of real and fake."""
    real, fake = (x.clone().requires_grad_(True) for x in batch[:2])
    loss = structure_loss(real, fake, weight=batch.weight, labels=batch.labels, queue=queue, **options)
    grad_real, grad_fake = torch.autograd.grad(loss, (real, fake))
    return loss.detach(), grad_real, grad_fake


def by_hand(batch: Queue, queue: Queue | None, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The same in float64, the narrower features filled up with zeros by the caller."""
    width = max(x.shape[1] for x in batch[:2])

    def filled(samples: Queue) -> Queue:
        wide = [torch.nn.functional.pad(x.double(), (0, width - x.shape[1])) for x in samples[:2]]
        return samples._replace(real=wide[0], fake=wide[1])

    loss, *grads = evaluate(filled(batch), None if queue is None else filled(queue), impl="reference", **options)
    grad_real, grad_fake = (g[:, : x.shape[1]] for g, x in zip(grads, batch[:2], strict=True))
    return loss, grad_real, grad_fake


@implementations
@settings(deadline=None, max_examples=40)
@given(
    size=st.integers(3, 12),
    # On a line or in a plane some of the points would be closer than float32 can tell.
    widths=st.tuples(st.integers(3, 40), st.integers(3, 40)),
    dtypes=st.tuples(st.sampled_from(FLOATS), st.sampled_from(FLOATS)),
    relation=st.sampled_from(RELATIONS),
    normalize=st.sampled_from(NORMALIZATIONS),
    past=st.integers(0, 9),
)
def test_width_and_dtype_of_real_and_fake_are_their_own(impl, size, widths, dtypes, relation, normalize, past) -> None:
    batch = unlike(size, widths, dtypes)
    queue = unlike(past, widths, (torch.float32, torch.float32), seed=1) if past else None
    options: dict[str, Any] = {"relation": relation, "normalize": normalize, "tau": 3.0}
    found, expected = evaluate(batch, queue, impl=impl, **options), by_hand(batch, queue, **options)
    assert found[0].dtype == (torch.float64 if torch.float64 in dtypes else torch.float32)
    assert [x.dtype for x in found[1:]] == list(dtypes) and [x.shape for x in found[1:]] == [x.shape for x in batch[:2]]
    # Sums in the wider dtype, or float32; pair weights are rounded to it, and each gradient to its own.
    wide = torch.promote_types(*dtypes)
    units = [max(torch.finfo(x).eps for x in (wide, y)) for y in (torch.float32, *dtypes)]
    for value, exact, unit in zip(found, expected, units, strict=True):
        assert float((value.double() - exact).abs().max()) <= 64 * unit * (1 + float(exact.abs().max()))


@needs_kernel
@pytest.mark.parametrize("dtypes", list(itertools.product((torch.float32, torch.bfloat16), repeat=2)))
def test_the_operator_takes_them_too(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """What compiled code calls."""
    batch = unlike(12, (7, 5), dtypes)

    def loss(real: Tensor, fake: Tensor) -> Tensor:
        return structure_loss(real, fake, weight=batch.weight)

    results = []
    for call in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)):
        real, fake = (x.clone().requires_grad_(True) for x in batch[:2])
        results.append(torch.autograd.grad(call(real, fake), (real, fake)))
    assert all(torch.equal(found, value) for found, value in zip(*results, strict=True))


@implementations
def test_a_queue_is_as_wide_as_each_side(impl: str) -> None:
    batch, queue = unlike(4, (3, 5), (torch.float32,) * 2), unlike(6, (5, 3), (torch.float32,) * 2)
    with pytest.raises(ValueError, match=r"queue.real.shape=\(6, 5\): must be \[q, 3\], as wide as real"):
        evaluate(batch, queue, impl=impl)
    with pytest.raises(ValueError, match=r"queue.fake.shape=\(6, 3\): must be \[q, 5\], as wide as fake"):
        evaluate(batch, queue._replace(real=queue.real[:, :3]), impl=impl)
