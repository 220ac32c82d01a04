"""diffusers' AutoencoderKL behind one scale and one identity."""

import json
import shutil
from pathlib import Path

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


def test_a_pickle_is_not_read(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "pickled")
    torch.save(load_file(folder / WEIGHTS), folder / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        Autoencoder.load(str(folder))
