"""The public structure loss: what it accepts, and one clear error for each thing it does not."""

import subprocess
import sys
from typing import Any

import pytest
import torch

import sadm_kernels
from sadm_kernels import StructureLoss, structure_loss


def features(size: int = 4, d: int = 3, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    real, fake = torch.randn(2, size, d, generator=torch.Generator().manual_seed(0)).to(dtype)
    return real, fake


REAL, FAKE = features()


def test_arguments_are_left_alone() -> None:
    real, fake = features()
    weight, labels = torch.tensor([1.0, 2.0, 0.0, 1.0]), torch.tensor([0, 0, 1, 1])
    before = [x.clone() for x in (real, fake, weight, labels)]
    structure_loss(real, fake.requires_grad_(True), weight=weight, labels=labels).backward()
    for x, y in zip((real, fake, weight, labels), before, strict=True):
        assert torch.equal(x, y)


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


def test_the_package_needs_torch_only_and_not_all_of_it() -> None:
    """Not sadm_fast, DeepSpeed or pydantic; triton and torch.compile are imported when they are used."""
    names = ("sadm_fast", "triton", "torch._dynamo", "deepspeed", "pydantic", "numpy.testing")
    code = f"import sys, sadm_kernels; sadm_kernels.backends(); print([m for m in {names} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_every_public_name_is_there() -> None:
    for name in sadm_kernels.__all__:
        assert getattr(sadm_kernels, name) is not None
