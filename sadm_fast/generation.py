"""A finished (or stopped) run, for use: its configuration, classes and averaged denoiser."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sadm_fast.build import Undrawn, build_denoiser, load_weights
from sadm_fast.config import Config, check_config
from sadm_fast.counters import Purpose, normal
from sadm_fast.diffusion import guided, sample
from sadm_fast.diffusion.process import Steps
from sadm_fast.diffusion.samplers import sampler_name
from sadm_fast.errors import UserError
from sadm_fast.files import parse_json
from sadm_fast.models import Denoiser
from sadm_fast.models.autoencoder import Autoencoder
from sadm_fast.run import checkpoint
from sadm_fast.run.folder import RunFolder
from sadm_fast.run.manifest import EMA_FILE


class Trained(NamedTuple):
    """What sampling and evaluation need of a run."""

    config: Config
    classes: list[str]
    filled: list[int]  # the labels that it was trained on, of those of `classes`
    model: Denoiser  # EMA weights, eval mode
    step: int
    latent_space: dict[str, Any] | None  # of the autoencoder it was trained with; None: it paints pixels
    checkpoint: Path

    def autoencoder(self, device: torch.device, path: str | None = None) -> Autoencoder | None:
        """What turns its samples into images, from `path` or where the run had it; None if they are images.

        Raises UserError if it cannot be loaded or is not the one of the training.
        """
        latents = self.config.latents
        if self.latent_space is None or latents is None:
            if path is not None:
                raise UserError(f"--autoencoder {path}: the run of {self.checkpoint} paints pixels; leave it out")
            return None
        loaded = Autoencoder.load(path or latents.autoencoder, device=device, scale=latents.scale)
        loaded.require_space(self.latent_space, f"checkpoint {self.checkpoint}")
        return loaded


def load_trained(run: Path, device: torch.device, say: Callable[[str], None]) -> Trained:
    """The averaged weights of a run's newest whole checkpoint; damaged ones are named by `say`.

    Raises:
        UserError: the folder holds no run, or no checkpoint that is whole.
    """
    folder = RunFolder(run)
    try:
        config = check_config(parse_json(folder.config.read_bytes()))
        facts = parse_json(folder.facts.read_bytes())
        classes = [str(name) for name in facts["classes"]]
        empty = set(facts.get("empty_classes", ()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run}: holds no run that can be read ({error})") from None
    found = next(checkpoint.whole(folder.checkpoints, say), None)
    if found is None:
        raise UserError(f"{run}: has no whole checkpoint yet; train first")
    with Undrawn():
        model = build_denoiser(config, config.denoiser.num_classes or len(classes))
    model = model.to(device).eval().requires_grad_(False)
    space = found.manifest.latent_space
    try:
        load_weights(model, load_file(found.folder / EMA_FILE))
        if config.latents is not None and space is None:
            raise RuntimeError("it does not say which autoencoder it was trained with")
    except (RuntimeError, SafetensorError) as error:
        raise UserError(f"{found.folder}: does not fit the run's config.json ({error})") from None
    filled = [label for label in range(len(classes)) if label not in empty]
    return Trained(config, classes, filled, model, found.manifest.step, space, found.folder)


_DECODED_AT_ONCE = 8  # latents: a decoder takes some hundred times the memory of its image


def to_images(samples: Tensor, autoencoder: Autoencoder | None) -> Tensor:
    """Samples as images float32 [B, C, H, W] in about [-1, 1]: decoded if they are latents (of this autoencoder)."""
    if autoencoder is None:
        return samples
    return torch.cat([autoencoder.decode(part) for part in samples.split(_DECODED_AT_ONCE)])


def generate(
    config: Config,
    model: Denoiser,
    labels: Tensor,
    ids: Tensor,
    *,
    steps: Steps,
    guidance_scale: float,
    guide: Denoiser | None = None,
) -> Tensor:
    """Samples of `labels` [B], drawn as config.sampling says but for steps and guidance: float32 [B, C, H, W].

    All noise, the steps' too, is a function of (seed, id): a sample is the same in any batch and on any rank.

    guide: of autoguidance; None: guidance is classifier-free.
    """
    sampling, process, shape = config.sampling, config.process, config.sample_shape
    denoise = guided(
        process,
        model,
        labels,
        model.null_class,
        guidance_scale,
        channels=sampling.guidance_channels,
        interval=sampling.guidance_interval,
        guide=guide,
        clip=sampling.clip_denoised,
    )
    name = sampler_name(sampling.sampler, process)
    return sample(
        process,
        denoise,
        normal(config.seed, Purpose.SAMPLE_NOISE, ids, shape),
        steps,
        name,
        lambda step: normal(config.seed, Purpose.STEP_NOISE, ids, shape, step),
        **sampling.options(name),
    )
