"""The public structure loss: what it accepts, and one clear error for each thing it does not."""

import subprocess
import sys
from typing import Any

import pytest
import torch

import sadm_kernels
from sadm_kernels import StructureLoss, backends, native, structure_loss


def features(size: int = 4, d: int = 3, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    real, fake = torch.randn(2, size, d, generator=torch.Generator().manual_seed(0)).to(dtype)
    return real, fake


REAL, FAKE = features()
FLOATS = "must be float16, bfloat16, float32 or float64"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"relation": "manhattan"}, "relation='manhattan': must be one of euclidean, cosine, gaussian"),
        ({"penalty": "l2"}, "penalty='l2': must be one of squared, absolute, huber"),
        ({"normalize": None}, "normalize=None: must be one of unit, mean, none"),
        ({"impl": "cuda"}, "impl='cuda': must be one of auto, reference, native, triton"),
        ({"real": REAL[0]}, r"real.shape=\(3,\): must be \[B, d\]"),
        ({"fake": FAKE[None]}, r"fake.shape=\(1, 4, 3\): must be \[B, d\]"),
        ({"real": REAL[:3]}, r"real.shape=torch.Size\(\[3, 3\]\) but fake.shape=torch.Size\(\[4, 3\]\)"),
        ({"fake": FAKE[:, :2]}, r"real.shape=torch.Size\(\[4, 3\]\) but fake.shape=torch.Size\(\[4, 2\]\)"),
        ({"fake": FAKE.double()}, "real.dtype=torch.float32 but fake.dtype=torch.float64"),
        ({"fake": FAKE.to("meta")}, "real.device=cpu but fake.device=meta"),
        ({"real": REAL.long(), "fake": FAKE.long()}, f"real.dtype=torch.int64: {FLOATS}"),
        ({"fake": FAKE.to(torch.complex64)}, f"fake.dtype=torch.complex64: {FLOATS}"),
        ({"fake": FAKE.to(torch.float8_e4m3fn)}, f"fake.dtype=torch.float8_e4m3fn: {FLOATS}"),
        ({"tau": 0.0}, "tau=0.0: must be a positive number"),
        ({"tau": float("nan")}, "tau=nan: must be a positive number"),
        ({"delta": -1.0}, "delta=-1.0: must be a positive number"),
        ({"delta": float("inf")}, "delta=inf: must be a positive number"),
        ({"weight": torch.ones(3)}, r"weight.shape=\(3,\): must be \[4\], one entry a sample"),
        ({"weight": torch.ones(4, 1)}, r"weight.shape=\(4, 1\): must be \[4\]"),
        ({"weight": torch.ones(4, device="meta")}, "weight.device=meta: must be cpu"),
        ({"weight": torch.tensor([1.0, -0.5, 1.0, 1.0])}, "weight: has -0.5, must not be negative"),
        ({"weight": torch.zeros(4)}, "weight: all 4 are zero, at least one must be positive"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, r"labels.shape=\(5,\): must be \[4\], one entry a sample"),
        ({"labels": torch.zeros(4)}, "labels.dtype=torch.float32: must be an integer type"),
        ({"labels": torch.zeros(4, dtype=torch.int64, device="meta")}, "labels.device=meta: must be cpu"),
    ],
)
def test_a_bad_argument_is_named_with_its_value(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        structure_loss(**({"real": REAL, "fake": FAKE} | wrong))


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


def test_a_weight_that_is_trained_needs_the_reference() -> None:
    weight = torch.ones(4, requires_grad=True)
    with pytest.raises(ValueError, match="weight.requires_grad=True: impl='native'.*use impl='reference'"):
        structure_loss(REAL, FAKE, weight=weight, impl="native")
    (grad,) = torch.autograd.grad(structure_loss(REAL, FAKE, weight=weight), weight)
    (expected,) = torch.autograd.grad(structure_loss(REAL, FAKE, weight=weight, impl="reference"), weight)
    assert torch.equal(grad, expected) and grad.any()


def test_bad_input_is_refused_before_a_backend_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_library", None)  # any use of it would be another error
    with pytest.raises(ValueError, match="weight: all 4 are zero"):
        structure_loss(REAL, FAKE, weight=torch.zeros(4), impl="native")


def test_a_dtensor_is_refused_with_what_to_pass() -> None:
    class DTensor(torch.Tensor):
        pass

    with pytest.raises(ValueError, match=r"real is a DTensor: pass real.to_local\(\) and the process group as group="):
        structure_loss(REAL.as_subclass(DTensor), FAKE)


def test_the_reference_backend_is_always_there() -> None:
    assert backends()["reference"] == "ok"
    assert set(backends()) == {"reference", "native", "triton"}
    expected = structure_loss(REAL, FAKE, impl="reference")
    torch.testing.assert_close(structure_loss(REAL, FAKE, impl="auto"), expected)


@pytest.mark.skipif(backends()["native"] != "ok", reason=backends()["native"])
def test_on_the_cpu_the_fused_kernel_is_the_default() -> None:
    found = structure_loss(REAL, FAKE.clone().requires_grad_(True), impl="auto")
    assert type(found.grad_fn).__name__ == "_EagerBackward"


def test_arguments_are_left_alone() -> None:
    real, fake = features()
    weight, labels = torch.tensor([1.0, 2.0, 0.0, 1.0]), torch.tensor([0, 0, 1, 1])
    before = [x.clone() for x in (real, fake, weight, labels)]
    structure_loss(real, fake.requires_grad_(True), weight=weight, labels=labels).backward()
    for x, y in zip((real, fake, weight, labels), before, strict=True):
        assert torch.equal(x, y)


def test_an_integer_weight_counts_as_a_float() -> None:
    weight = torch.tensor([1, 2, 0, 1])
    assert torch.equal(structure_loss(REAL, FAKE, weight=weight), structure_loss(REAL, FAKE, weight=weight.float()))


def test_the_result_does_not_ask_for_a_gradient_that_nobody_wants() -> None:
    assert not structure_loss(REAL, FAKE).requires_grad
    with torch.no_grad():
        assert not structure_loss(REAL, FAKE.clone().requires_grad_(True)).requires_grad


@pytest.mark.parametrize("relation", ["euclidean", "cosine", "gaussian"])
@pytest.mark.parametrize("normalize", ["unit", "mean", "none"])
def test_shapes_can_be_worked_out_without_data(relation: str, normalize: str) -> None:
    real, fake = (x.to("meta") for x in features(dtype=torch.bfloat16))
    weight = torch.zeros(4, device="meta")  # values are not looked at where there are none
    loss = structure_loss(real, fake, relation=relation, normalize=normalize, weight=weight)
    assert loss.shape == () and loss.dtype == torch.float32 and loss.device.type == "meta"


def test_the_module_is_the_function() -> None:
    options: dict[str, Any] = {
        "relation": "gaussian",
        "penalty": "huber",
        "normalize": "mean",
        "tau": 0.7,
        "delta": 0.1,
        "impl": "reference",
    }
    module = StructureLoss(**options)
    weight, labels = torch.tensor([1.0, 2.0, 1.0, 1.0]), torch.tensor([0, 0, 1, 0])
    assert torch.equal(module(REAL, FAKE), structure_loss(REAL, FAKE, **options))
    expected = structure_loss(REAL, FAKE, weight=weight, labels=labels, **options)
    assert torch.equal(module(REAL, FAKE, weight, labels), expected)
    assert not list(module.parameters()) and not module.state_dict()
    assert "gaussian" in repr(module) and "huber" in repr(module)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"relation": "x"}, "relation='x'"),
        ({"penalty": "x"}, "penalty='x'"),
        ({"normalize": "x"}, "normalize='x'"),
        ({"impl": "x"}, "impl='x'"),
        ({"tau": 0.0}, "tau=0.0"),
        ({"delta": -2.0}, "delta=-2.0"),
    ],
)
def test_the_module_checks_its_options_when_it_is_made(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StructureLoss(**wrong)


def test_the_package_needs_torch_only() -> None:
    """Nothing of sadm_fast, Triton, DeepSpeed or pydantic comes with the import."""
    code = (
        "import sys, sadm_kernels; "
        "print([m for m in ('sadm_fast', 'triton', 'deepspeed', 'pydantic', 'numpy.testing') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_every_public_name_is_there() -> None:
    for name in sadm_kernels.__all__:
        assert getattr(sadm_kernels, name) is not None
