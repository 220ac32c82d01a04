"""A micro-batch in three launches, through what the public function calls on a GPU."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sadm_kernels import ops
from sadm_kernels.reference import NORMALIZATIONS, PENALTIES, RELATIONS
from sadm_kernels.samples import Options, Samples
from sadm_kernels.triton import few
from tests.kernels.triton.test_device_code import (
    BF16,
    DELTA,
    FP16,
    FP32,
    TAU,
    assert_as_exact_as_eager,
    features,
    place,
    some_labels,
    some_weight,
)

__all__ = ["place"]


class NoKernels:
    """A module of kernels whose launches are taken down and not done."""

    def __init__(self) -> None:
        self.launched: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return defaultdict(lambda: lambda *_, **__: self.launched.append(name))


@pytest.fixture(autouse=True)
def small_tiles(request, monkeypatch) -> None:
    if "strict" in str(request.node.callspec.params.get("place", "")):
        code = request.getfixturevalue("strict").load(Path(few.__file__).with_name("few_code.py"))
        monkeypatch.setattr(few, "kernels_of", lambda device: code)
        monkeypatch.setattr(few, "BLOCK", 16)
        monkeypatch.setattr(few, "BLOCK_D", 32)
        monkeypatch.setattr(few, "BLOCK_K", {2: 32, 4: 32})


def loss_and_gradients(
    real: Tensor, fake: Tensor, need=(True, True), factor: float = 1.0, **options: Any
) -> tuple[Tensor, list[Tensor]]:
    batch = Samples(real, fake, options.pop("weight", None), options.pop("labels", None))
    chosen = Options(tau=TAU, delta=DELTA, **options)
    batch = batch._replace(real=real.detach().requires_grad_(need[0]), fake=fake.detach().requires_grad_(need[1]))
    loss = ops.structure_loss("triton", batch, chosen)
    wanted = [x for x in batch[:2] if x.requires_grad]
    return loss.detach(), list(torch.autograd.grad(factor * loss, wanted))


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("normalize", ["unit", "none"])
@pytest.mark.parametrize("relation", RELATIONS)
def test_as_the_definition(place, relation, normalize, dtype) -> None:
    number = RELATIONS.index(relation) + NORMALIZATIONS.index(normalize)
    options: dict[str, Any] = {"relation": relation, "normalize": normalize, "penalty": PENALTIES[number % 3]}
    if number % 2:
        options |= {"weight": some_weight(place.size, place.device), "labels": some_labels(place.size, place.device)}
    for mean in (0.0, 3.0):
        real, fake = features(place.size, 48, dtype, place.device, mean)
        loss, (of_real, of_fake) = loss_and_gradients(real, fake, **options)
        assert of_real.dtype == of_fake.dtype == dtype and loss.dtype == FP32
        assert_as_exact_as_eager(real, fake, (loss, of_real, of_fake), mean=mean, **options)


@pytest.mark.parametrize("d", [1, 21, 50])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_any_number_of_features(place, dtype, d) -> None:
    """Rows that do not start on 16 bytes."""
    real, fake = features(place.size, d, dtype, place.device)
    assert few.fits(Samples(real, fake), Options())
    loss, (of_real, of_fake) = loss_and_gradients(real, fake, normalize="none")
    assert_as_exact_as_eager(real, fake, (loss, of_real, of_fake), normalize="none")


@pytest.mark.parametrize("normalize", ["unit", "none"])
def test_a_mean_of_a_thousand_costs_float32_little(place, normalize) -> None:
    real, fake = features(place.size, 48, FP32, place.device, mean=1000.0)
    loss, (of_real, of_fake) = loss_and_gradients(real, fake, normalize=normalize)
    mean = 1000.0**0.5 if normalize == "unit" else 0.0  # as in test_device_code
    assert_as_exact_as_eager(real, fake, (loss, of_real, of_fake), mean=mean, normalize=normalize)


@pytest.mark.parametrize("size", [64, 512])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("need", [(False, True), (True, True)])
def test_three_launches_and_nothing_else(monkeypatch, need, dtype, size) -> None:
    kernels = NoKernels()
    monkeypatch.setattr(few, "kernels_of", lambda device: kernels)
    real, fake = (x.requires_grad_(wanted) for x, wanted in zip(features(size, 48, dtype), need, strict=True))
    one = torch.ones(())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ops.structure_loss("triton", Samples(real, fake), Options()).backward(one)
    assert kernels.launched == ["few_weights", "few_sums", "few_gradient"]
    # torch itself only allocates memory and makes views.
    done = {event.name.removeprefix("aten::") for event in profile.events() if event.name.startswith("aten::")}
    assert done <= {"empty", "empty_like", "empty_strided", "split_with_sizes", "split", "narrow", "slice", "select",
                    "view", "as_strided", "detach"}  # fmt: skip


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("relation", RELATIONS)
def test_equal_batches_and_equal_rows(place, relation, dtype) -> None:
    real, fake = features(place.size, 48, dtype, place.device)
    loss, grads = loss_and_gradients(real, real.clone(), relation=relation)
    assert not loss.any() and not any(x.any() for x in grads)
    fake[:] = fake[0]
    _, (_, of_fake) = loss_and_gradients(real, fake, normalize="none", relation=relation)
    assert relation == "cosine" or not of_fake.any()


def test_repeated_scaled_alone_and_in_any_order(place) -> None:
    real, fake = features(place.size, 48, BF16, place.device)
    loss, both = loss_and_gradients(real, fake)
    place.shuffle(1)
    again, (alone,) = loss_and_gradients(real, fake, need=(False, True), factor=2.0)
    assert torch.equal(again, loss) and torch.equal(alone, 2 * both[1])
    batch = Samples(real, fake.clone().requires_grad_())
    loss = ops.structure_loss("triton", batch, Options())
    first, second = (torch.autograd.grad(loss, batch.fake, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, batch.fake, create_graph=True)


def test_no_pair_counts(place) -> None:
    real, fake = features(place.size, 48, BF16, place.device)
    loss, grads = loss_and_gradients(real, fake, labels=torch.arange(place.size, device=place.device))
    assert loss == 0 and not any(x.any() for x in grads)


def test_rows_of_length_1_may_have_had_any_length(place) -> None:
    real, fake = features(place.size, 48, FP32, place.device)
    loss, (of_real, _) = loss_and_gradients(real, fake)
    again, (scaled, _) = loss_and_gradients(real * 2.0**66, fake / 2.0**66)
    assert torch.equal(again, loss) and torch.equal(scaled * 2.0**66, of_real)


def test_rows_of_one_direction_are_one_point(place) -> None:
    real, _ = features(place.size, 48, FP32, place.device)
    fake = torch.linspace(0.5, 3.0, place.size, device=place.device)[:, None] * real[:1]
    _, (_, of_fake) = loss_and_gradients(real, fake)
    assert not of_fake.any()
