"""EDM's augmentation: what is done is what the labels say, from counters, with the paper's probabilities."""

import math

import pytest
import torch
from torch import Tensor

from sadm_fast import augmentation
from sadm_fast.augmentation import LABELS, augment
from sadm_fast.config import check_config
from sadm_fast.feed import draw_batch

SIDE = 32


def picture(u: Tensor, v: Tensor) -> Tensor:
    """A smooth picture at places u, v [..., SIDE, SIDE] from -1 to 1, without symmetries, dark at the edge."""
    return torch.exp(-8 * ((u - 0.2) ** 2 + (v + 0.1) ** 2)) - 0.7 * torch.exp(-10 * ((u + 0.2) ** 2 + (v - 0.2) ** 2))


def places() -> tuple[Tensor, Tensor]:
    line = (torch.arange(SIDE, dtype=torch.float64) + 0.5) * (2 / SIDE) - 1
    v, u = torch.meshgrid(line, line, indexing="ij")
    return u, v


def pictures(count: int) -> Tensor:
    return picture(*places()).float().expand(count, 1, SIDE, SIDE).contiguous()


def undone(told: Tensor, sign: int) -> Tensor:
    """What the picture shows where a place of the result comes from; NaN where it comes from beyond the edge.

    sign: of the anisotropy, which its labels leave open.
    """
    mirrored, flipped, scaling, cos, sin, a, b, tx, ty = told.tolist()
    u, v = places()
    x, y = u - 0.25 * tx, v - 0.25 * ty
    strength = sign * math.hypot(a, b)
    axis = math.atan2(b, a) if sign > 0 else math.atan2(-b, -a)
    along, across = x * math.cos(axis) + y * math.sin(axis), -x * math.sin(axis) + y * math.cos(axis)
    along, across = along / 2 ** (0.2 * strength), across * 2 ** (0.2 * strength)
    x, y = along * math.cos(axis) - across * math.sin(axis), along * math.sin(axis) + across * math.cos(axis)
    x, y = (cos + 1) * x + sin * y, -sin * x + (cos + 1) * y
    x, y = x / 2 ** (0.2 * scaling), y / 2 ** (0.2 * scaling)
    shown = picture(-x if mirrored else x, -y if flipped else y)
    return shown.masked_fill((x.abs() > 0.9) | (y.abs() > 0.9), torch.nan)


def test_an_image_is_moved_as_its_labels_say() -> None:
    images, labels = augment(pictures(64), torch.arange(64), seed=3, probability=1.0)
    for image, told in zip(images, labels.double(), strict=True):
        errors = [(image[0] - undone(told, sign)).abs().nan_to_num(0.0).max() for sign in (1, -1)]
        # Bilinear between samples of half a pixel: their second difference, and the filters' ripple.
        assert min(errors) < 0.03, told


def test_what_nothing_was_done_to_keeps_its_bits() -> None:
    x = torch.rand(256, 3, 8, 8)
    images, labels = augment(x, torch.arange(256), seed=0, probability=0.12)
    assert labels.shape == (256, LABELS) and labels.dtype == torch.float32
    still = (labels[:, 1:] == 0).all(dim=1)
    mirrored = labels[:, 0] == 1
    assert torch.equal(images[still & ~mirrored], x[still & ~mirrored])
    assert torch.equal(images[still & mirrored], x[still & mirrored].flip(3))
    assert (images[~still] != x[~still]).flatten(1).any(dim=1).all()


def test_the_papers_probabilities() -> None:
    count, p = 20_000, 0.15
    _, labels = augment(torch.zeros(count, 1, 2, 2), torch.arange(count), seed=5, probability=p)
    share = (labels != 0).double().mean(dim=0)
    expected = torch.tensor([0.5, p / 2, *[p] * 7], dtype=torch.float64)
    expected[6] = p / 2  # half of the anisotropic ones are along the axes
    assert ((share - expected).abs() < 4 * (expected * (1 - expected) / count).sqrt()).all()
    for column in (2, 7, 8):  # normal numbers
        drawn = labels[labels[:, column] != 0, column]
        assert abs(float(drawn.std()) - 1) < 0.05 and abs(float(drawn.mean())) < 0.1
    assert abs(float(labels[labels[:, 4] != 0, 3].mean()) + 1) < 0.1  # cos - 1 of a whole turn


def test_it_is_a_samples_own_whatever_it_comes_with() -> None:
    x, ids = torch.rand(16, 3, 8, 8), torch.arange(16) * 2**33
    together = augment(x, ids, seed=1, probability=0.5)
    for i in range(16):
        image, labels = augment(x[i : i + 1], ids[i : i + 1], seed=1, probability=0.5)
        assert torch.equal(labels[0], together[1][i])
        torch.testing.assert_close(image[0], together[0][i], rtol=1e-5, atol=1e-6)
    assert not torch.equal(augment(x, ids, seed=2, probability=0.5)[1], together[1])


@pytest.mark.parametrize("side", [2, 5, 8])
def test_a_flat_image_stays_flat_however_small(side: int) -> None:
    images, _ = augment(torch.full((32, 1, side, side), 0.3), torch.arange(32), seed=0, probability=1.0)
    torch.testing.assert_close(images, torch.full_like(images, 0.3), rtol=1e-5, atol=1e-6)


def test_a_micro_batch_is_augmented_before_noise_and_the_network_is_told() -> None:
    denoiser = {"architecture": "unet", "augment": 0.9, "channels": 8, "attention_resolutions": []}
    config = check_config({"name": "x", "data": {"resolution": 8, "channels": 3}, "denoiser": denoiser})
    x, ids, labels = torch.rand(8, 3, 8, 8), torch.arange(8), torch.zeros(8, dtype=torch.long)
    batch = draw_batch(config, x, labels, ids, null_class=1)
    images, told = augmentation.augment(x, ids, config.seed, 0.9)
    assert torch.equal(batch.x0, images) and torch.equal(batch.more[0], ids) and torch.equal(batch.more[1], told)
    plain = config.model_copy(update={"denoiser": config.denoiser.model_copy(update={"augment": 0.0})})
    batch = draw_batch(plain, x, labels, ids, null_class=None)
    assert batch.more == () and torch.equal(batch.x0, x) and torch.equal(batch.condition, labels)
