"""The U-Net: shapes, what EDM has otherwise than diffusers, labels, dropout by counters, recomputation."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sadm_fast.diffusion import EDM
from sadm_fast.diffusion.guidance import guided
from sadm_fast.models import UNet
from sadm_fast.models.unet import norm_groups

SMALL: dict[str, Any] = {"channels": 8, "multipliers": (1, 2), "depth": 1, "attention_resolutions": (4,)}


def tiny(**options: Any) -> UNet:
    """A network off its initial values, at which it is almost 0."""
    torch.manual_seed(0)
    model = UNet(8, 1, 1, 3, **{**SMALL, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 1, 8, 8, generator=generator), torch.tensor([-3.0, 0.0, 1.0, 2.0]), torch.tensor([0, 1, 2, 3])


# Of EDM's release: 55.7 M (cifar10, class-conditional) and 61.8 M (ffhq). Here 3% and 1% more: see models/unet.py.
@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        ({"input_size": 32}, 57_188_611),
        ({"input_size": 64, "multipliers": (1, 2, 2, 2)}, 62_516_227),
    ],
)
def test_edms_sizes(options: dict[str, Any], parameters: int) -> None:
    with torch.device("meta"):
        model = UNet(in_channels=3, out_channels=3, augmentation_labels=9, num_classes=10, **options)
    edms = 55.7e6 if options["input_size"] == 32 else 61.8e6
    assert sum(p.numel() for p in model.parameters()) == parameters == pytest.approx(edms, rel=0.03)


def test_it_begins_at_almost_nothing() -> None:
    model = UNet(16, 3, 3, 10, channels=32, attention_resolutions=(8,))
    assert model(torch.randn(4, 3, 16, 16), torch.zeros(4), torch.zeros(4, dtype=torch.long)).std() < 1e-3


def test_every_residual_sum_is_divided_by_the_root_of_two() -> None:
    model, embedding = tiny(depth=2), torch.randn(1, 32)
    blocks: list[Any] = [part for part in model.modules() if hasattr(part, "output_scale_factor")]
    attentions: list[Any] = [part for part in model.modules() if hasattr(part, "rescale_output_factor")]
    assert len(blocks) == 2 * 2 + 1 + 2 + 2 * 3 + 1 and len(attentions) == 2 + 1 + 3
    for block in [*blocks, *attentions]:
        width = (block.norm1 if block in blocks else block.group_norm).num_channels
        out = block.conv2 if block in blocks else block.to_out[0]
        torch.nn.init.zeros_(out.weight)
        torch.nn.init.zeros_(out.bias)
        x = torch.randn(1, width, 4, 4)
        result = block(x, embedding) if block in blocks else block(x)
        if result.shape == x.shape:
            torch.testing.assert_close(result, x / math.sqrt(2))


def test_names_are_those_of_diffusers() -> None:
    names = list(tiny(conditional=False).state_dict())
    assert all(name.startswith("unet.") for name in names) and len(set(names)) == len(names)
    assert "unet.down_blocks.1.attentions.0.to_q.weight" in names


def test_its_sinusoids_are_those_of_edms_noise_level() -> None:
    model = tiny(time_factor=0.25 / EDM.time_scale)
    sigma = torch.tensor([0.002, 0.5, 80.0])
    _, t = EDM().model_input(torch.zeros(3, 1, 8, 8), sigma)
    c_noise = sigma.double().log() / 4  # Karras et al. 2022, table 1
    half = 4
    frequencies = torch.tensor([10000.0 ** (-i / (half - 1)) for i in range(half)], dtype=torch.float64)
    angles = c_noise[:, None] * frequencies
    expected = torch.cat([angles.sin(), angles.cos()], dim=1).float()
    torch.testing.assert_close(model.unet.time_proj(model.time_factor * t), expected, rtol=0, atol=1e-6)


def test_labels_matter_if_it_is_told_them_and_only_then() -> None:
    x, t, y = inputs()
    model, blind = tiny(), tiny(conditional=False)
    assert model.null_class == 3 and blind.null_class is None
    assert (model(x, t, y) - model(x, t, y.flip(0))).abs().amax(dim=(1, 2, 3)).min() > 1e-3
    assert torch.equal(blind(x, t, y), blind(x, t, y.flip(0)))
    with pytest.raises(ValueError, match="guidance_scale=2: the network knows no null class; use 1, or a guide"):
        guided(EDM(), blind, y, blind.null_class, 2.0)
    guided(EDM(), blind, y, blind.null_class, 1.0)(x, t.exp())
    guided(EDM(), blind, y, blind.null_class, 2.0, guide=tiny(conditional=False))(x, t.exp())


def test_it_is_told_how_images_were_augmented() -> None:
    x, t, y = inputs()
    model, told = tiny(augmentation_labels=2), torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, -2.0], [1.0, 1.0]])
    plain, augmented = model(x, t, y), model(x, t, y, None, told)
    different = (plain - augmented).abs().amax(dim=(1, 2, 3))
    assert different[0] == 0.0 and different[1:].min() > 1e-4


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_is_a_samples_own(checkpointing: bool) -> None:
    x, t, y = inputs()
    model = tiny(dropout=0.5, activation_checkpointing=checkpointing)
    ids = torch.tensor([7, 2**40, 9, 10])
    together = model(x, t, y, ids)
    alone = torch.cat([model(*(v[i : i + 1] for v in (x, t, y, ids))) for i in range(4)])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)  # sums in fp32 in another order
    assert (together - model(x, t, y, ids + 1)).abs().amax(dim=(1, 2, 3)).min() > 1e-3
    assert (together - model(x, t, y)).abs().amax(dim=(1, 2, 3)).min() > 1e-3
    other = tiny(dropout=0.5, seed=1)
    assert not torch.equal(together, other(x, t, y, ids))


def test_recomputation_changes_no_bit_of_the_gradients() -> None:
    x, t, y = inputs()
    model, ids = tiny(dropout=0.3), torch.arange(4)
    gradients = []
    for checkpointing in (False, True):
        model.activation_checkpointing = checkpointing
        loss = model(x, t, y, ids).square().sum()
        with torch.no_grad():  # what dropout is handed in between must not matter
            model(x, t, y, ids + 100)
        gradients.append(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_resolutions": (16,)}, r"attention_resolutions=\[16\]: levels have \[8, 4\]"),
        ({"multipliers": (1,) * 5, "attention_resolutions": ()}, "side 8: 5 levels need a multiple of 16"),
        ({"channels": 6}, "channels=6: must be a multiple of 4, and of 32 from 128 on"),
        ({"channels": 144}, "channels=144"),
    ],
)
def test_sizes_that_do_not_fit_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**options)


def test_groups_of_the_norms_have_four_channels_at_least() -> None:
    assert [norm_groups(channels) for channels in (4, 8, 96, 128, 256)] == [1, 2, 24, 32, 32]


def test_gradients_reach_every_parameter() -> None:
    x, t, y = inputs()
    model = tiny(augmentation_labels=9)
    model(x, t, y, torch.arange(4), torch.randn(4, 9)).square().sum().backward()
    assert all(p.grad is not None and math.isfinite(float(p.grad.abs().sum())) for p in model.parameters())
    still = [name for name, p in model.named_parameters() if p.grad is not None and float(p.grad.abs().max()) == 0.0]
    assert still == []
