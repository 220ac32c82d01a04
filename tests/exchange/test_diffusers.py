"""DiT to diffusers and back: the same weights, and the same latents from DiTPipeline."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from sadm_fast.diffusion import VP, guided, sample
from sadm_fast.errors import UserError
from sadm_fast.exchange.diffusers import fitted_steps, from_diffusers, save_pipeline, time_fit, to_diffusers
from sadm_fast.exchange.reading import read_weights
from sadm_fast.models import DiT
from sadm_fast.models.autoencoder import Autoencoder
from sadm_fast.models.dit import timestep_frequencies
from tests.support.autoencoders import save_autoencoder

CLASSES = 7
EPS = torch.finfo(torch.float32).eps


def network(learn_sigma: bool = True, **sizes: int) -> DiT:
    """A small DiT in which no weight is 0."""
    options: dict[str, Any] = {"input_size": 8, "patch_size": 2, "hidden_size": 32, "depth": 2, "num_heads": 2}
    dit = DiT(**options | {"in_channels": 4, "out_channels": 4 + 4 * learn_sigma, "num_classes": CLASSES} | sizes)
    generator = torch.Generator().manual_seed(5)
    for parameter in dit.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return dit.eval().requires_grad_(False)


def weights(dit: DiT) -> dict[str, Tensor]:
    """All that has weights: not the fixed pos_embed."""
    return {name: value for name, value in dit.state_dict().items() if name != "pos_embed"}


@settings(deadline=None, max_examples=15)
@given(
    depth=st.integers(1, 3),
    heads=st.integers(1, 3),
    patch=st.sampled_from([1, 2, 4]),
    classes=st.sampled_from([1, 2, 999, 1000]),
    sigma=st.booleans(),
)
def test_names_go_there_and_back(depth: int, heads: int, patch: int, classes: int, sigma: bool) -> None:
    dit = network(sigma, depth=depth, hidden_size=16 * heads, num_heads=heads, patch_size=patch, num_classes=classes)
    there = to_diffusers(dit.state_dict(), steps=0)
    back = from_diffusers(there, Path("nowhere"))
    own = weights(dit)
    assert back.keys() == own.keys() and all(torch.equal(back[name], own[name]) for name in own)


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Autoencoder:
    return Autoencoder.load(str(save_autoencoder(tmp_path_factory.mktemp("autoencoder") / "vae")))


@pytest.fixture(scope="module", params=[True, False], ids=["variance", "mean"])
def learn_sigma(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module")
def pipeline_folder(autoencoder: Autoencoder, learn_sigma: bool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline") / "x"
    names = [f"class {label}" for label in range(CLASSES)]
    save_pipeline(folder, network(learn_sigma), autoencoder, names, steps=20)
    return folder


def latents_of(pipeline: Any, labels: list[int], scale: float, steps: int) -> Tensor:
    """The scaled latents that the pipeline decodes; its noise is of generator seed 3."""
    decoded = []
    decode = pipeline.vae.decode
    pipeline.vae.decode = lambda z: decode(decoded.append(z) or z)  # type: ignore[func-returns-value]
    generator = torch.Generator().manual_seed(3)
    pipeline(labels, guidance_scale=scale, num_inference_steps=steps, generator=generator, output_type="pt")
    pipeline.vae.decode = decode
    return decoded[0] * pipeline.vae.config.scaling_factor


def ours(dit: DiT, learn_sigma: bool, labels: list[int], scale: float, steps: int) -> Tensor:
    process, y = VP(learn_sigma=learn_sigma), torch.tensor(labels)
    noise = torch.randn(len(labels), 4, 8, 8, generator=torch.Generator().manual_seed(3))
    return sample(process, guided(process, dit, y, CLASSES, scale), noise, f"ddim{steps}", "ddim")


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_pipeline_draws_the_same_latents(pipeline_folder: Path, learn_sigma: bool, scale: float) -> None:
    from diffusers import DiTPipeline

    pipeline = DiTPipeline.from_pretrained(pipeline_folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.get_label_ids(["class 6"]) == [6]
    wanted = ours(network(learn_sigma), learn_sigma, [0, 3, 6], scale, 20)
    found = latents_of(pipeline, [0, 3, 6], scale, 20)
    # Untrained, it does not hold the latents near 1: they are compared in units of the largest. diffusers adds up its
    # schedule in float32, a relative error of some roundings a step.
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_its_time_embedding_is_another_which_the_fit_makes_up_for(pipeline_folder: Path, learn_sigma: bool) -> None:
    from diffusers.models.embeddings import CombinedTimestepLabelEmbeddings

    levels = torch.tensor(fitted_steps(20))
    theirs = CombinedTimestepLabelEmbeddings(CLASSES, 32).time_proj(levels)
    wanted = timestep_frequencies(levels)
    assert (theirs - wanted).abs().max() > 0.1, "diffusers has DiT's frequencies now: the fit is no longer needed"
    # Phases up to 999 are rounded in float32, by both.
    error = (theirs.double() @ time_fit(levels.tolist()).T - wanted).abs().max()
    assert error <= 4 * 1000 * EPS


def test_without_a_fit_one_line_gives_the_same_latents_at_any_steps(
    autoencoder: Autoencoder, learn_sigma: bool, tmp_path: Path
) -> None:
    from diffusers import DiTPipeline

    save_pipeline(tmp_path / "x", network(learn_sigma), autoencoder, ["a"] * CLASSES, steps=0)
    pipeline = DiTPipeline.from_pretrained(tmp_path / "x", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    for block in pipeline.transformer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0  # the line of the model card
    wanted = ours(network(learn_sigma), learn_sigma, [0, 3, 6], 3.0, 125)
    assert (latents_of(pipeline, [0, 3, 6], 3.0, 125) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("where", ["", "transformer", "transformer/diffusion_pytorch_model.safetensors"])
def test_what_was_written_is_read_back(pipeline_folder: Path, learn_sigma: bool, where: str) -> None:
    found, own = read_weights("k", pipeline_folder / where), weights(network(learn_sigma))
    assert found.keys() == own.keys()
    for name, value in own.items():
        # The fit's condition number is about 70; it meets one rounding to float32.
        close = name == "t_embedder.mlp.0.weight"
        torch.testing.assert_close(found[name], value, rtol=0, atol=70 * EPS * value.abs().max().item() if close else 0)


def test_a_pickled_file_of_early_versions_is_read(pipeline_folder: Path, learn_sigma: bool, tmp_path: Path) -> None:
    copy = tmp_path / "transformer"
    shutil.copytree(pipeline_folder / "transformer", copy)
    state = load_file(copy / "diffusion_pytorch_model.safetensors")
    (copy / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(state | {"pos_embed.pos_embed": torch.ones(1, 16, 32)}, copy / "diffusion_pytorch_model.bin")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"_class_name": "Transformer2DModel"}))
    found = read_weights("k", tmp_path)
    assert found.keys() == network(learn_sigma).state_dict().keys() and (found["pos_embed"] == 1).all()


def test_a_folder_without_weights_in_one_file_is_one_line(pipeline_folder: Path, tmp_path: Path) -> None:
    shutil.copy(pipeline_folder / "transformer/config.json", tmp_path)
    with pytest.raises(UserError, match="has no transformer weights in one file"):
        read_weights("k", tmp_path)


def test_blocks_with_embedders_of_their_own_and_missing_names_are_refused(tmp_path: Path) -> None:
    state = {name: value.clone() for name, value in to_diffusers(network().state_dict(), steps=0).items()}
    state["transformer_blocks.1.norm1.emb.timestep_embedder.linear_2.bias"][0] += 1
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="its blocks have a norm1.emb.timestep_embedder.linear_2 each"):
        read_weights("k", tmp_path / "x.safetensors")
    del state["transformer_blocks.1.attn1.to_k.weight"]
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="cannot be read as weights"):
        read_weights("k", tmp_path / "x.safetensors")


@pytest.mark.parametrize("steps", [0, 18, 100, 250])
def test_steps_that_the_pipeline_takes_otherwise_or_that_are_too_many_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=rf"^{steps}: must be one of 1, 2, 4, 5, 8, 10, 20, 25, 40, 50$"):
        fitted_steps(steps)
