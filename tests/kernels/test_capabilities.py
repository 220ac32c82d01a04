"""Which backend runs: the fused one where it can do what is asked, else the reference, which says so or works alone."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, func
from torch.autograd import forward_ad

from sadm_kernels import StructureLoss, backends, native, reference, structure_loss
from sadm_kernels.capabilities import FUSED

REAL, FAKE = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
needs_kernel = pytest.mark.skipif(backends()["native"] != "ok", reason=backends()["native"])


def test_a_backend_that_is_not_here_says_why_and_what_to_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_status", "not built: there is no compiler")
    assert backends()["native"] == "not built: there is no compiler"
    with pytest.raises(RuntimeError, match="impl='native': not built: there is no compiler; or use impl='auto'"):
        structure_loss(REAL, FAKE, impl="native")
    assert torch.equal(structure_loss(REAL, FAKE), structure_loss(REAL, FAKE, impl="reference"))


@pytest.mark.parametrize(
    ("impl", "device", "message"),
    [
        ("triton", "cpu", "impl='triton': runs on cuda, but the features are on cpu; use impl='auto'"),
        ("native", "meta", "impl='native': runs on cpu, but the features are on meta; use impl='auto'"),
    ],
)
def test_a_backend_of_another_device_is_refused(impl: str, device: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        structure_loss(REAL.to(device), FAKE.to(device), impl=impl)


def test_the_reference_backend_is_always_there() -> None:
    assert backends()["reference"] == "ok"
    assert set(backends()) == {"reference", *FUSED}
    expected = structure_loss(REAL, FAKE, impl="reference")
    torch.testing.assert_close(structure_loss(REAL, FAKE, impl="auto"), expected)


@needs_kernel
def test_on_the_cpu_the_fused_kernel_is_the_default() -> None:
    found = structure_loss(REAL, FAKE.clone().requires_grad_(True), impl="auto")
    assert type(found.grad_fn).__name__ == "_EagerBackward"


@needs_kernel
def test_a_weight_that_is_trained_needs_the_reference() -> None:
    weight = torch.ones(4, requires_grad=True)
    with pytest.raises(ValueError, match="weight.requires_grad=True: impl='native'.*use impl='reference'"):
        structure_loss(REAL, FAKE, weight=weight, impl="native")
    (grad,) = torch.autograd.grad(structure_loss(REAL, FAKE, weight=weight), weight)
    (expected,) = torch.autograd.grad(structure_loss(REAL, FAKE, weight=weight, impl="reference"), weight)
    assert torch.equal(grad, expected) and grad.any()


@needs_kernel
def test_a_relation_that_only_the_reference_knows_works_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What adding a relation to reference.py gives before any kernel has it."""
    known = reference._relation

    def relation_or_product(rows: Tensor, columns: Tensor, pair_weight: Tensor, **options: Any) -> Tensor:
        if options["relation"] == "product":
            return rows @ columns.T
        return known(rows, columns, pair_weight, **options)

    with pytest.raises(ValueError, match="relation='product': must be one of"):
        structure_loss(REAL, FAKE, relation="product")
    monkeypatch.setattr(reference, "RELATIONS", (*reference.RELATIONS, "product"))
    monkeypatch.setattr(reference, "_relation", relation_or_product)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = [structure_loss(REAL, FAKE, relation="product"), StructureLoss(relation="product")(REAL, FAKE)]
    difference = (FAKE @ FAKE.T - REAL @ REAL.T).fill_diagonal_(0)
    torch.testing.assert_close(found, [difference.square().sum() / 12] * 2)
    (warning,) = said
    assert "relation='product': impl='native' has euclidean, cosine, gaussian; impl='auto' takes the reference" in str(
        warning.message
    )
    assert warning.filename == __file__
    with pytest.raises(ValueError, match="relation='product': impl='native' has .*; use impl='reference'"):
        structure_loss(REAL, FAKE, relation="product", impl="native")


def dual(loss: Callable[[Tensor], Tensor]) -> Tensor:
    with forward_ad.dual_level():
        tangent: Tensor | None = forward_ad.unpack_dual(loss(forward_ad.make_dual(FAKE, REAL))).tangent
    assert tangent is not None
    return tangent


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor]], Any]] = {
    "grad": lambda loss: func.grad(loss)(FAKE),
    "vjp": lambda loss: func.vjp(loss, FAKE)[1](torch.ones(())),
    "jvp": lambda loss: func.jvp(loss, (FAKE,), (REAL,)),
    "vmap": lambda loss: func.vmap(loss)(torch.stack([FAKE, REAL])),
    "vmap of grad": lambda loss: func.vmap(func.grad(loss))(torch.stack([FAKE, -FAKE])),
    "hessian": lambda loss: func.hessian(loss)(FAKE),
    "forward mode": dual,
    "compiled jvp": lambda loss: torch.compile(
        lambda x: func.jvp(loss, (x,), (REAL,)), fullgraph=True, backend="eager"
    )(FAKE),
}


@needs_kernel
@pytest.mark.parametrize("name", TRANSFORMS)
def test_under_a_transform_the_reference_runs(name: str) -> None:
    """The fused kernels have no rule for it; a compiled jvp was once zero without a word."""
    transform = TRANSFORMS[name]

    def loss(impl: str) -> Callable[[Tensor], Tensor]:
        return lambda fake: structure_loss(REAL, fake, weight=torch.ones(4), impl=impl)

    torch.testing.assert_close(transform(loss("auto")), transform(loss("reference")))
    if "compiled" not in name:
        with pytest.raises(ValueError, match="impl='native' has no rule for torch.func .*; use impl='reference'"):
            transform(loss("native"))


def test_weights_can_be_mapped_over() -> None:
    weights = torch.rand(3, 4) + 0.1
    found = func.vmap(lambda weight: structure_loss(REAL, FAKE, weight=weight))(weights)
    torch.testing.assert_close(found, torch.stack([structure_loss(REAL, FAKE, weight=w) for w in weights]))


@needs_kernel
def test_several_gradients_at_once_go_through_the_fused_kernel() -> None:
    fake = FAKE.clone().requires_grad_(True)
    loss = structure_loss(REAL, fake, impl="native")
    (one,) = torch.autograd.grad(loss, fake, retain_graph=True)
    (three,) = torch.autograd.grad(loss, fake, torch.tensor([1.0, 2.0, 4.0]), is_grads_batched=True)
    assert torch.equal(three, torch.stack([one, 2 * one, 4 * one]))
