"""diffusers' AutoencoderKL behind one scale and one identity."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sadm_fast.errors import UserError
from sadm_fast.models.autoencoder import Autoencoder
from tests.support.autoencoders import save_autoencoder

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_autoencoder(tmp_path_factory.mktemp("autoencoder") / "one")


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_encode_and_decode_are_diffusers_own_around_the_scale(saved: Path) -> None:
    autoencoder = Autoencoder.load(str(saved))
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        posterior = autoencoder.module.encode(images).latent_dist
        decoded = autoencoder.module.decode(posterior.mean).sample
    ours = autoencoder.encode(images)
    assert ours.mean.shape == ours.std.shape == (2, 4, 16, 16)
    assert torch.equal(ours.mean, posterior.mean) and torch.equal(ours.std, posterior.std)
    # scaling by 0.5 and back is exact in binary
    assert torch.equal(autoencoder.decode(0.5 * posterior.mean), decoded)


def test_the_shape_and_scale_come_from_the_configuration(saved: Path) -> None:
    autoencoder = Autoencoder.load(str(saved))
    assert (autoencoder.image_channels, autoencoder.latent_channels, autoencoder.downsample) == (3, 4, 2)
    assert autoencoder.scale == (0.5, 0.0)
    assert Autoencoder.load(str(saved), scale=0.25).scale.scale == 0.25


def test_a_shift_is_taken_off_before_scaling(saved: Path, tmp_path: Path) -> None:
    shifted = shutil.copytree(saved, tmp_path / "shifted")
    change_config(shifted, shift_factor=0.25)
    autoencoder = Autoencoder.load(str(shifted))
    assert autoencoder.scale.to_scaled(torch.tensor(1.25)) == 0.5
    assert autoencoder.scale.to_raw(torch.tensor(0.5)) == 1.25


def test_the_identity_is_that_of_the_weights_wherever_they_lie(saved: Path, tmp_path: Path) -> None:
    identity = Autoencoder.load(str(saved)).identity
    copy = shutil.copytree(saved, tmp_path / "copy")
    change_config(copy, scaling_factor=0.7, sample_size=512, _diffusers_version="0.1")
    moved = Autoencoder.load(str(copy))
    assert moved.identity == identity and moved.space["scale"] == 0.7
    assert Autoencoder.load(str(saved), precision="bf16").identity == identity

    state = load_file(copy / WEIGHTS)
    state["decoder.conv_out.bias"][0] += 2.0**-20
    save_file(state, copy / WEIGHTS, {"format": "pt"})
    assert Autoencoder.load(str(copy)).identity != identity


def test_another_autoencoder_or_scale_is_refused_by_name(saved: Path, tmp_path: Path) -> None:
    autoencoder = Autoencoder.load(str(saved))
    autoencoder.require_space(autoencoder.space, "the cache")
    other = Autoencoder.load(str(save_autoencoder(tmp_path / "other", seed=1)))
    with pytest.raises(
        UserError, match=r"latents\.autoencoder=.*one: has autoencoder sha256 .* but the cache was made"
    ):
        autoencoder.require_space(other.space, "the cache")
    with pytest.raises(UserError, match=r"has scale 0\.5, but the cache was made with 0\.25"):
        autoencoder.require_space(autoencoder.space | {"scale": 0.25}, "the cache")


def test_bf16_computes_in_bf16_and_answers_in_float32(saved: Path) -> None:
    full, half = Autoencoder.load(str(saved)), Autoencoder.load(str(saved), precision="bf16")
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    a, b = full.encode(images).mean, half.encode(images).mean
    assert b.dtype == torch.float32 and not torch.equal(a, b)
    # A few dozen roundings of 2^-9 each, relative to the largest latent.
    assert (a - b).abs().max() < 0.1 * a.abs().max()


@pytest.mark.parametrize("missing", ["folder", "config.json", WEIGHTS])
def test_what_is_missing_is_one_line(
    saved: Path, tmp_path: Path, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "there"
    if missing != "folder":
        shutil.copytree(saved, folder)
        (folder / missing).unlink()
    with pytest.raises(UserError, match=r"^latents\.autoencoder=.*cannot be loaded .*; give a folder with") as caught:
        Autoencoder.load(str(folder))
    assert "\n" not in str(caught.value)


def change_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    state = load_file(folder / WEIGHTS)
    for name, value in changes.items():
        state.pop(name, None)
        if value is not None:
            state[name] = value
    save_file(state, folder / WEIGHTS, {"format": "pt"})


def cut_short(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:5000])


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a weight is missing": (
        lambda folder: change_weights(folder, **{"encoder.conv_out.weight": None}),
        r"its safetensors file lacks encoder\.conv_out\.weight: it is damaged or of another model",
    ),
    "two weights are missing": (
        lambda folder: change_weights(folder, **{"quant_conv.weight": None, "quant_conv.bias": None}),
        r"lacks quant_conv\.bias and 1 more",
    ),
    "a weight too many": (
        lambda folder: change_weights(folder, **{"loss.logvar": torch.zeros(1)}), r"has the unknown loss\.logvar: ",
    ),
    "a weight of another shape": (
        lambda folder: change_weights(folder, **{"quant_conv.bias": torch.zeros(3)}),
        "size mismatch for quant_conv.bias",
    ),
    "a weight that is not finite": (
        lambda folder: change_weights(folder, **{"quant_conv.bias": torch.full((8,), torch.nan)}),
        r"its quant_conv\.bias holds values that are not finite",
    ),
    "cut short": (cut_short, "Unable to load weights"),
    "another class": (
        lambda folder: change_config(folder, _class_name="AutoencoderTiny"), "its class is AutoencoderTiny",
    ),
    "statistics of each channel": (
        lambda folder: change_config(folder, latents_mean=[0.1] * 4, latents_std=[1.0] * 4),
        "its config.json has latents_mean",
    ),
    "a deviation of each channel": (
        lambda folder: change_config(folder, latents_std=[1.0] * 4), "its config.json has latents_std",
    ),
    "no scale": (lambda folder: change_config(folder, scaling_factor=None), "its scaling_factor=None"),
    "a scale of zero": (lambda folder: change_config(folder, scaling_factor=0), "its scaling_factor=0"),
    "a shift in words": (lambda folder: change_config(folder, shift_factor="x"), "shift_factor=x must be numbers"),
    "a list": (lambda folder: (folder / "config.json").write_text("[]"), "its config.json holds no JSON object"),
    "no lists": (lambda folder: change_config(folder, block_out_channels=8), "object is not subscriptable"),
    "unknown blocks": (lambda folder: change_config(folder, down_block_types=["Mystery"] * 2), "Mystery"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_foreign_autoencoder_is_one_line(
    saved: Path, tmp_path: Path, damage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    break_it, message = DAMAGES[damage]
    folder = shutil.copytree(saved, tmp_path / "there")
    break_it(folder)
    with pytest.raises(UserError, match=r"^latents\.autoencoder=.*there: cannot be loaded \(.*" + message) as caught:
        Autoencoder.load(str(folder))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")  # diffusers has nothing to add


def test_a_scale_of_ones_own_stands_for_one_that_is_missing(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "there")
    change_config(folder, scaling_factor=None)
    assert Autoencoder.load(str(folder), scale=0.3).scale.scale == 0.3


def test_the_names_that_older_versions_of_diffusers_wrote_are_known(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "there")
    state = load_file(folder / WEIGHTS)
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        state = {name.replace(f".{new}.", f".{old}."): value for name, value in state.items()}
    save_file(state, folder / WEIGHTS, {"format": "pt"})
    assert Autoencoder.load(str(folder)).identity == Autoencoder.load(str(saved)).identity


def test_a_pickle_is_not_read(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "pickled")
    torch.save(load_file(folder / WEIGHTS), folder / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        Autoencoder.load(str(folder))


def test_a_decoded_latent_passes_its_gradient_back_whatever_the_batch(tmp_path: Path) -> None:
    autoencoder = Autoencoder.load(str(save_autoencoder(tmp_path / "x")))
    latents = torch.randn(6, 4, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    found = autoencoder.decode_with_gradient(latents)
    assert torch.equal(autoencoder.decode_with_gradient(latents.detach()), found.detach())
    torch.testing.assert_close(found.detach(), autoencoder.decode(latents))  # kernels may differ with the batch
    (gradient,) = torch.autograd.grad((weight * found).sum(), latents)
    plain = autoencoder.module.decode(autoencoder.scale.to_raw(latents)).sample
    (expected,) = torch.autograd.grad((weight * plain).sum(), latents)
    torch.testing.assert_close(gradient, expected)
    assert all(p.grad is None and not p.requires_grad for p in autoencoder.module.parameters())
