"""From the configuration's `data` block to samples: open what it names, check that it fits, iterate.

What the denoiser sees is called a sample here: an image in [-1, 1] or a scaled latent (sadm_fast.scales).
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sadm_fast.config import Config
from sadm_fast.console import Console
from sadm_fast.data import load_images, make_loader, open_images
from sadm_fast.data.batch import Loader
from sadm_fast.data.checking import require_sound
from sadm_fast.data.latent_loader import LatentLoader
from sadm_fast.data.latents import LatentSource, checked_shards
from sadm_fast.data.order import MicroBatchPlan
from sadm_fast.data.source import ImageSource, Source
from sadm_fast.errors import UserError


def open_data(config: Config, console: Console, *, check: bool = True, path: str | None = None) -> Source:
    """What data.path (or `path`) holds. With `check` its contents are tested as data.broken says (remembered).

    Raises UserError for what is missing, broken, or not what the configuration says.
    """
    data = config.data
    path = data.path if path is None else path
    if data.source != "latents":
        images = _listed(path, data.source, console)
        if check:
            check_images(config, images, console)
        return images
    latents = LatentSource.open(path)
    _require_fit(config, latents)
    if check and data.broken == "refuse":
        with console.progress("checking shards") as progress:
            problems = checked_shards(latents, threads=data.threads, progress=progress)
        if problems:
            more = f" (and {len(problems) - 1} more shards)" if len(problems) > 1 else ""
            raise UserError(f"{problems[0]}{more}; delete it and encode again, it alone is made anew")
    return latents


def open_images_to_encode(config: Config, console: Console, *, check: bool = True) -> ImageSource:
    """The images that encode.py turns into data.path."""
    if config.latents is None:
        raise UserError(f"data.source={config.data.source}: encode.py needs a configuration with data.source=latents")
    if config.latents.images is None:
        raise UserError("latents.images: is null; say which images to encode, --set latents.images=PATH")
    images = _listed(config.latents.images, config.latents.images_source, console)
    if check:
        check_images(config, images, console)
    return images


def _listed(path: str, kind: Literal["folder", "webdataset"], console: Console) -> ImageSource:
    with console.progress("listing shards") as progress:
        return open_images(path, kind=kind, progress=progress)


def check_images(config: Config, images: ImageSource, console: Console) -> None:
    """UserError for broken images as data.broken says; decoding all of them once, the first time."""
    data = config.data
    with console.progress("checking images") as progress:
        require_sound(
            images,
            data.resolution,
            enlarge=data.enlarge,
            policy=data.broken,
            threads=data.threads,
            progress=progress,
        )


def _require_fit(config: Config, latents: LatentSource) -> None:
    assert config.latents is not None
    made = latents.encoding
    for key, asked, there in (
        ("data.resolution", config.data.resolution, made.resolution),
        ("data.channels", config.data.channels, made.image_channels),
        ("latents.channels", config.latents.channels, made.latent_channels),
        ("latents.downsample", config.latents.downsample, made.downsample),
        ("latents.scale", made.scale if config.latents.scale is None else config.latents.scale, made.scale),
    ):
        if asked != there:
            raise UserError(f"{key}={asked}: the latents in data.path={latents.where} were made with {there}")


def make_feed(
    config: Config,
    source: Source,
    *,
    seed: int,
    micro_batch: int,
    grad_accumulation: int = 1,
    rank: int = 0,
    world_size: int = 1,
    first_sample: int = 0,
    device: torch.device | str = "cpu",
) -> Loader:
    """An endless iterator of this rank's micro-batches of samples from global sample `first_sample` on; close it."""
    data = config.data
    common: dict[str, Any] = {
        "seed": seed,
        "flip": data.flip,
        "micro_batch": micro_batch,
        "grad_accumulation": grad_accumulation,
        "rank": rank,
        "world_size": world_size,
        "first_sample": first_sample,
    }
    plan = MicroBatchPlan(num_images=len(source), **common)
    _require_mixed(source, plan)
    if isinstance(source, LatentSource):
        return LatentLoader(source, plan, threads=data.threads, prefetch=data.prefetch, device=device)
    assert isinstance(source, ImageSource)
    return make_loader(
        source,
        loader=data.loader,
        resolution=data.resolution,
        channels=data.channels,
        enlarge=data.enlarge,
        threads=data.threads,
        prefetch=data.prefetch,
        decode=data.decode,
        device=device,
        **common,
    )


def _require_mixed(source: Source, plan: MicroBatchPlan) -> None:
    """The game compares the samples of a batch: one that is sorted by class would teach Psi nothing."""
    shares = np.bincount(source.labels, minlength=len(source.classes)) / len(source)
    together = np.concatenate([source.labels[plan[i].indices] for i in range(4)])
    if shares.max() <= 0.5 and len(together) >= 32 and (together == together[0]).all():  # by chance: under 2^-31
        raise RuntimeError(f"{source.where}: {len(together)} samples in a row are of one class; the order is not mixed")


def load_samples(config: Config, source: Source, indices: Sequence[int] | np.ndarray) -> Tensor:
    """Samples of `source`, not mirrored, latents at their posterior's mean: float32 [N, C, H, W]."""
    if isinstance(source, LatentSource):
        return source.means(np.asarray(indices, dtype=np.int64))
    assert isinstance(source, ImageSource)
    data = config.data
    return load_images(source, indices, data.resolution, data.channels, data.enlarge, data.threads)
