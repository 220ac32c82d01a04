"""The fused loss as PyTorch sees it: operator, autograd, torch.compile, autocast."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from sadm_kernels import Queue, StructureLoss, backends, native, relation_matrix, structure_loss
from sadm_kernels.ops import _structure_loss

pytestmark = pytest.mark.skipif(backends()["native"] != "ok", reason=backends()["native"])


def features(size: int = 20, d: int = 8, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    real, fake = torch.randn(2, size, d, generator=torch.Generator().manual_seed(0)).to(dtype)
    return real.clone(), fake.clone()


NO_QUEUE = (None,) * 4
WEIGHT, LABELS = torch.linspace(0, 1, 20), torch.arange(20) % 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("need_real", "need_fake"), list(itertools.product([False, True], repeat=2)))
def test_the_operator_passes_opcheck(dtype: torch.dtype, need_real: bool, need_fake: bool) -> None:
    real, fake = features(dtype=dtype)
    options: list[Any] = [None, None, "euclidean", "squared", "unit", None, None]
    if need_real:
        options = [WEIGHT, LABELS, "gaussian", "huber", "mean", torch.tensor(0.8), torch.tensor(0.2)]
    options[2:2] = NO_QUEUE
    arguments = (real.requires_grad_(need_real), fake.requires_grad_(need_fake), *options)
    result = torch.library.opcheck(_structure_loss, (*arguments, "native", need_real, need_fake))
    assert set(result.values()) == {"SUCCESS"}


class Player(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.psi, self.loss = nn.Linear(8, 6), StructureLoss(**options)

    def forward(self, real: Tensor, fake: Tensor, weight: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        return 2 * self.loss(self.psi(real), self.psi(fake), weight, labels)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "backend"),
    [({}, "inductor"), ({"relation": "gaussian", "penalty": "huber", "normalize": "mean"}, "aot_eager")],
)
def test_a_module_with_it_compiles_without_a_graph_break(options: dict[str, Any], backend: str) -> None:
    torch.manual_seed(0)
    module = Player(**options)
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    for size, extra in ((20, {}), (20, {"weight": WEIGHT, "labels": LABELS}), (12, {})):
        real, fake = features(size)
        expected, found = module(real, fake, **extra), compiled(real, fake, **extra)
        torch.testing.assert_close(found, expected)
        gradients = [torch.autograd.grad(loss, list(module.parameters())) for loss in (expected, found)]
        torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("impl", ["native", "reference"])
@pytest.mark.parametrize("dynamic", [None, True])
def test_tau_and_delta_change_without_a_graph_break_or_another_compilation(impl: str, dynamic: bool | None) -> None:
    """torch.compile makes a symbol of a number that changes, and with dynamic=True of every number."""
    real, fake = features()
    fake.requires_grad_(True)
    module = StructureLoss(relation="gaussian", penalty="huber", impl=impl)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend=counter)
    for step in range(4):
        module.tau, module.delta = 1.0 - step / 10, 0.1 + step / 100
        losses = module(real, fake), compiled(real, fake)
        torch.testing.assert_close(losses[1], losses[0])
        torch.testing.assert_close(*(torch.autograd.grad(loss, fake) for loss in losses))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("impl", ["native", "reference"])
def test_the_default_device_of_torch_changes_nothing(impl: str) -> None:
    """The C++ library once wrote through pointers of that device."""
    real, fake = features()
    queue = Queue(*features(30), None, torch.arange(30) % 3)
    given: dict[str, Any] = {"weight": WEIGHT, "labels": LABELS, "queue": queue, "normalize": "mean", "impl": impl}
    results = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            f, g = real.clone().requires_grad_(True), fake.bfloat16().requires_grad_(True)
            loss = structure_loss(f, g, **given)
            results.append((loss.detach(), *torch.autograd.grad(loss, (f, g)), relation_matrix(real)))
    assert all(torch.equal(found, expected) for found, expected in zip(*results, strict=True))


def test_fake_tensors_go_through_without_memory_behind_them() -> None:
    with FakeTensorMode():
        real, fake = torch.empty(20, 8, dtype=torch.bfloat16), torch.empty(20, 8, dtype=torch.bfloat16)
        loss = structure_loss(real, fake.requires_grad_(True), impl="native")
        (grad,) = torch.autograd.grad(loss, fake)
    assert loss.shape == () and loss.dtype == torch.float32 and grad.shape == (20, 8) and grad.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_and_memory_layout_change_nothing(dtype: torch.dtype) -> None:
    real, fake = features(dtype=dtype)
    expected = structure_loss(real, fake, impl="native")
    assert expected.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(structure_loss(real, fake, impl="native"), expected)
    strided = torch.stack([fake, fake], dim=2)[:, :, 0].requires_grad_(True)
    loss = structure_loss(real.T.contiguous().T, strided, impl="native")
    assert not strided.is_contiguous() and torch.equal(loss, expected)
    ones = torch.ones(1, dtype=torch.float32).expand(3)
    (grad,) = torch.autograd.grad(loss.expand(3), strided, grad_outputs=ones)
    contiguous = fake.clone().requires_grad_(True)
    (one,) = torch.autograd.grad(structure_loss(real, contiguous, impl="native"), contiguous, torch.tensor(3.0))
    assert torch.equal(grad, one)


def test_a_second_backward_through_one_graph_is_not_scaled_twice() -> None:
    real, fake = features()
    fake.requires_grad_(True)
    loss = structure_loss(real, fake, impl="native")
    first, second, third = (torch.autograd.grad(loss * k, fake, retain_graph=True)[0] for k in (1.0, 4.0, 1.0))
    assert torch.equal(second, 4 * first) and torch.equal(third, first)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_second_derivative_is_refused_and_never_left_out(compiled: bool) -> None:
    """A gradient penalty through the kernel's constant gradient would be zero without a word."""
    real, fake = features()
    fake.requires_grad_(True)
    if compiled:  # the operator, which compiled code calls
        options = ("euclidean", "squared", "unit", None, None, "native", False, True)
        loss = _structure_loss(real, fake, None, None, *NO_QUEUE, *options)[0]
    else:
        loss = structure_loss(real, fake, impl="native")
    with pytest.raises(RuntimeError, match="no second derivative .*use impl='reference'"):
        torch.autograd.grad(loss, fake, create_graph=True)
    reference = structure_loss(real, fake, impl="reference")
    (grad,) = torch.autograd.grad(reference, fake, create_graph=True)
    assert torch.autograd.grad(grad.square().sum(), fake)[0].any()


@pytest.mark.parametrize("asking", [(False, False), (True, False), (False, True), (True, True)])
def test_only_gradients_that_somebody_wants_are_computed(asking, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    compute = native.loss_and_gradients

    def watched(p, moments, need_real, need_fake):
        seen.append((need_real, need_fake))
        return compute(p, moments, need_real, need_fake)

    monkeypatch.setattr(native, "loss_and_gradients", watched)
    real, fake = (x.requires_grad_(wanted) for x, wanted in zip(features(), asking, strict=True))
    assert structure_loss(real, fake).requires_grad == any(asking)
    with torch.no_grad():
        structure_loss(real, fake)
    assert seen == [asking, (False, False)]


def test_the_gradient_has_the_inputs_dtype_and_is_rounded_once() -> None:
    real, fake = features(dtype=torch.float16)
    wide = fake.float().requires_grad_(True)
    (expected,) = torch.autograd.grad(structure_loss(real.float(), wide, impl="native") * 3, wide)
    fake.requires_grad_(True)
    (found,) = torch.autograd.grad(structure_loss(real, fake, impl="native") * 3, fake)
    assert torch.equal(found, expected.half())
