"""What the loss does not accept: one clear ValueError each, which names the argument and its value."""

from typing import Any

import numpy as np
import pytest
import torch

from sadm_kernels import Queue, StructureLoss, native, relation_matrix, structure_loss

REAL, FAKE = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
FLOATS = "must be float16, bfloat16, float32 or float64"
NO_SAMPLE = torch.ones(3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"relation": "manhattan"}, "relation='manhattan': must be one of euclidean, cosine, gaussian"),
        ({"relation": ["cosine"]}, r"relation=\['cosine'\]: must be one of euclidean"),
        ({"penalty": "l2"}, "penalty='l2': must be one of squared, absolute, huber"),
        ({"normalize": None}, "normalize=None: must be one of unit, mean, none"),
        ({"impl": "cuda"}, "impl='cuda': must be one of auto, reference, native, triton"),
        ({"impl": REAL}, "impl=tensor"),
        ({"tau": 0.0}, "tau=0.0: must be a positive number"),
        ({"tau": float("nan")}, "tau=nan: must be a positive number"),
        ({"tau": "1"}, "tau='1': must be a positive number"),
        ({"tau": True}, "tau=True: must be a positive number"),
        ({"tau": torch.ones(2)}, "tau=tensor.*: must be a positive number"),
        ({"tau": torch.ones((), requires_grad=True)}, "tau.requires_grad=True: tau gets no gradient; use tau.item()"),
        ({"tau": torch.tensor(1j)}, "tau=tensor.*: must be a positive number"),
        ({"tau": torch.tensor(True)}, "tau=tensor.*: must be a positive number"),
        ({"tau": torch.ones((), device="meta")}, "tau=tensor.*: must be a positive number"),
        ({"tau": 10**400}, "tau=1000*: must be a positive number"),
        ({"delta": -1.0}, "delta=-1.0: must be a positive number"),
        ({"delta": float("inf")}, "delta=inf: must be a positive number"),
        ({"delta": None}, "delta=None: must be a positive number"),
        ({"delta": 1j}, "delta=1j: must be a positive number"),
        ({"real": None}, "real: must be a torch.Tensor, not NoneType"),
        ({"fake": FAKE.tolist()}, "fake: must be a torch.Tensor, not list"),
        ({"real": REAL.numpy()}, "real: must be a torch.Tensor, not ndarray"),
        ({"real": REAL[0]}, r"real.shape=\(3,\): must be \[B, d\]"),
        ({"fake": FAKE[None]}, r"fake.shape=\(1, 4, 3\): must be \[B, d\]"),
        ({"real": REAL[:3]}, r"real.shape=\(3, 3\) but fake.shape=\(4, 3\): .* must have as many rows"),
        ({"fake": FAKE.to("meta")}, "real.device=cpu but fake.device=meta"),
        ({"real": REAL.long(), "fake": FAKE.long()}, f"real.dtype=torch.int64: {FLOATS}"),
        ({"real": REAL > 0}, f"real.dtype=torch.bool: {FLOATS}"),
        ({"fake": FAKE.to(torch.complex64)}, f"fake.dtype=torch.complex64: {FLOATS}"),
        ({"fake": FAKE.to(torch.float8_e4m3fn)}, f"fake.dtype=torch.float8_e4m3fn: {FLOATS}"),
        ({"real": REAL.to_sparse()}, r"real.layout=torch.sparse_coo: must be dense; use real.to_dense\(\)"),
        ({"fake": torch.nested.nested_tensor(list(FAKE), layout=torch.jagged)}, "fake is a nested tensor"),
        ({"weight": [1.0] * 4}, "weight: must be a torch.Tensor, not list"),
        ({"weight": 1.0}, "weight: must be a torch.Tensor, not float"),
        ({"weight": torch.ones(3)}, r"weight.shape=\(3,\): must be \[4\], one entry a sample"),
        ({"weight": torch.ones(4, 1)}, r"weight.shape=\(4, 1\): must be \[4\]"),
        ({"weight": torch.ones(4, device="meta")}, "weight.device=meta: must be cpu"),
        ({"weight": torch.ones(4).to_sparse()}, "weight.layout=torch.sparse_coo: must be dense"),
        ({"weight": torch.ones(4).to(torch.complex64)}, "weight.dtype=torch.complex64: must be a float type"),
        ({"weight": torch.tensor([1.0, -0.5, 1.0, 1.0])}, "weight: has -0.5, must not be negative"),
        ({"weight": torch.tensor([1.0, 1.0, torch.inf, 1.0])}, "weight: has inf, must be finite"),
        ({"weight": torch.tensor([1.0, 1.0, -torch.inf, 1.0])}, "weight: has -inf, must be finite"),
        ({"weight": torch.tensor([1.0, 1.0, torch.nan, 1.0])}, "weight: has nan, must be finite"),
        ({"weight": torch.zeros(4)}, "weight: all 4 are zero, at least one must be positive"),
        ({"labels": [0] * 4}, "labels: must be a torch.Tensor, not list"),
        ({"labels": np.zeros(4, int)}, "labels: must be a torch.Tensor, not ndarray"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, r"labels.shape=\(5,\): must be \[4\], one entry a sample"),
        ({"labels": torch.zeros(4)}, "labels.dtype=torch.float32: must be an integer type"),
        ({"labels": torch.zeros(4, dtype=torch.int64, device="meta")}, "labels.device=meta: must be cpu"),
        ({"queue": 3}, "queue: must be a sadm_kernels.Queue, not int"),
        ({"queue": (REAL, FAKE)}, "queue: must be a sadm_kernels.Queue, not tuple"),
        ({"queue": Queue(REAL.tolist(), FAKE)}, "queue.real: must be a torch.Tensor, not list"),
        ({"queue": Queue(REAL, FAKE, NO_SAMPLE)}, r"queue.weight.shape=\(3,\): must be \[4\]"),
        ({"queue": Queue(REAL, FAKE, torch.full((4,), torch.nan))}, "queue.weight: has nan, must be finite"),
        ({"group": "world"}, "group: must be a torch.distributed.ProcessGroup that has this rank, or None, not str"),
        ({"group": 0}, "group: must be a torch.distributed.ProcessGroup .*, not int"),
    ],
)
def test_a_bad_argument_is_named_with_its_value(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        structure_loss(**({"real": REAL, "fake": FAKE} | wrong))


@pytest.mark.parametrize("name", ["relation", "penalty", "normalize", "impl", "tau", "delta", "group"])
def test_the_module_checks_its_options_when_it_is_made(name: str) -> None:
    wrong: dict[str, Any] = {name: "x"}
    with pytest.raises(ValueError, match=name):
        StructureLoss(**wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"relation": "x"}, "relation='x'"),
        ({"normalize": "x"}, "normalize='x'"),
        ({"tau": 0.0}, "tau=0.0"),
        ({"features": REAL.tolist()}, "features: must be a torch.Tensor, not list"),
        ({"features": REAL[0]}, r"features.shape=\(3,\): must be \[B, d\]"),
        ({"features": REAL.long()}, f"features.dtype=torch.int64: {FLOATS}"),
    ],
)
def test_a_relation_matrix_is_asked_for_in_the_same_terms(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        relation_matrix(**({"features": REAL} | wrong))


def test_a_dtensor_is_refused_with_what_to_pass() -> None:
    class DTensor(torch.Tensor):
        pass

    with pytest.raises(ValueError, match=r"real is a DTensor: pass real.to_local\(\) and the process group as group="):
        structure_loss(REAL.as_subclass(DTensor), FAKE)


def test_bad_input_is_refused_before_a_backend_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_library", None)  # any use of it would be another error
    with pytest.raises(ValueError, match="weight: all 4 are zero"):
        structure_loss(REAL, FAKE, weight=torch.zeros(4), impl="native")


@pytest.mark.parametrize("number", [1, np.float32(1.0), np.int64(1), torch.tensor(1.0)])
def test_tau_and_delta_are_any_real_number(number: Any) -> None:
    options: dict[str, Any] = {"relation": "gaussian", "penalty": "huber"}
    assert torch.equal(
        structure_loss(REAL, FAKE, tau=number, delta=number, **options), structure_loss(REAL, FAKE, **options)
    )


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.uint16, torch.bfloat16, torch.float64])
def test_weights_and_labels_are_of_any_real_dtype(dtype: torch.dtype) -> None:
    weight = torch.tensor([1, 1, 0, 1])
    expected = structure_loss(REAL, FAKE, weight=weight.float())
    assert torch.equal(structure_loss(REAL, FAKE, weight=weight.to(dtype)), expected)
    if not dtype.is_floating_point:
        labelled = structure_loss(REAL, FAKE, labels=weight)
        assert torch.equal(structure_loss(REAL, FAKE, labels=weight.to(dtype)), labelled)
