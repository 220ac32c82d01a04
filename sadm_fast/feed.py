"""From the configuration's `data` block to samples: open what it names, check that it fits, say how it is read.

What the denoiser sees is called a sample: an image in [-1, 1] or a scaled latent (sadm_fast.scales).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from torch import Tensor

from sadm_fast import augmentation, data
from sadm_fast.config import Config
from sadm_fast.console import Console
from sadm_fast.data.batch import LoaderSpec
from sadm_fast.data.latents import LatentCache, LatentSource
from sadm_fast.data.lightning_latents import LightningLatents
from sadm_fast.data.source import ImageSource, Source, printable, split
from sadm_fast.errors import UserError
from sadm_fast.game import Batch, draw
from sadm_fast.scales import LatentScale


def draw_batch(
    config: Config,
    x0: Tensor,
    labels: Tensor,
    sample_ids: Tensor,
    null_class: int | None,
    samples_per_step: int = 1,
) -> Batch:
    """A micro-batch as the denoiser is trained on it: augmented, noise drawn, with what a U-Net is told besides.

    x0: samples float32 [B, C, H, W]; labels, sample_ids: int64 [B]. All randomness is a function of (seed, sample_id).
    """
    denoiser = config.denoiser
    more: tuple[Tensor, ...] = (sample_ids,) if denoiser.dropout or denoiser.augment else ()
    if denoiser.augment:
        x0, told = augmentation.augment(x0, sample_ids, config.seed, denoiser.augment)
        more = (*more, told)
    return draw(
        config.process,
        x0,
        labels,
        sample_ids,
        seed=config.seed,
        null_class=null_class,
        label_dropout=denoiser.label_dropout,
        samples_a_level=samples_per_step if config.game.noise_levels == "batch" else 1,
        more=more,
    )


def loader_spec(config: Config) -> LoaderSpec:
    """How this configuration reads samples."""
    return LoaderSpec(**config.data.model_dump(include=set(LoaderSpec.__dataclass_fields__)))


def open_data(
    config: Config, console: Console, *, check: bool = True, path: str | None = None, own: Source | None = None
) -> Source:
    """List what data.path (or `path`) holds. With `check` its contents are tested as data.broken says (remembered).

    own: the source of a run that is given one (data.source=own).

    Of the run's own data, what data.held_out keeps back is left out: `open_held_out` is the rest.

    Raises UserError for what is missing, broken, or not what the configuration says.
    """
    source = _open(config, console, check, path, own)
    return split(source, config.data.held_out, config.seed)[0] if config.data.held_out and path is None else source


def open_held_out(config: Config, console: Console) -> Source | None:
    """What data.held_out keeps back from a run; None if it is 0. UserError as open_data."""
    if not config.data.held_out:
        return None
    return split(_open(config, console, False, None, None), config.data.held_out, config.seed)[1]


def _open(config: Config, console: Console, check: bool, path: str | None, own: Source | None) -> Source:
    with asked_as("data.path" if path is None else "--data"):
        if own is not None:
            source = own
        elif config.data.source == "own":
            raise UserError("data.source=own: is given to sadm_fast.train from Python (docs/extending.md)")
        else:
            with console.progress("listing shards") as progress:
                source = data.open_source(config.data.path if path is None else path, config.data.source, progress)
        if isinstance(source, LightningLatents):
            assert config.latents is not None
            scale = config.latents.scale
            source = source.with_scale(None if scale is None else LatentScale(scale))
        if isinstance(source, LatentSource):
            _require_fit(config, source)
        if check:
            _check(config, source, console)
    return source


def open_images_to_encode(config: Config, console: Console, *, check: bool = True) -> ImageSource:
    """List the images that encode.py turns into data.path; `check` as in open_data."""
    if config.latents is None:
        raise UserError(f"data.source={config.data.source}: encode.py needs a configuration with data.source=latents")
    if config.latents.autoencoder is None:
        raise UserError("latents.autoencoder: is null; say which one encodes, --set latents.autoencoder=PATH")
    if config.latents.images is None:
        raise UserError("latents.images: is null; say which images to encode, --set latents.images=PATH")
    with asked_as("latents.images"):
        with console.progress("listing shards") as progress:
            images = data.open_images(config.latents.images, config.latents.images_source, progress)
        if check:
            _check(config, images, console)
    return images


@contextmanager
def asked_as(name: str) -> Iterator[None]:
    """Rename data.path in a source's UserErrors to the field or option that the path was given with."""
    try:
        yield
    except UserError as error:
        text = str(error).replace("data.path=", f"{name} " if name.startswith("--") else f"{name}=")
        error.args = (text.replace("data.source=", "latents.images_source=") if name == "latents.images" else text,)
        raise


def _check(config: Config, source: Source, console: Console) -> None:
    what = "shards" if isinstance(source, LatentSource) else "images"
    with console.progress(f"checking {what}") as progress:
        data.require_sound(source, loader_spec(config), config.data.broken, progress)


def _require_fit(config: Config, latents: LatentSource) -> None:
    """UserError unless cached latents are of the configuration's shapes and scale."""
    assert config.latents is not None
    c, h, _ = latents.latent_shape
    if not isinstance(latents, LatentCache):
        side = config.data.resolution // config.latents.downsample
        if (config.latents.channels, side) != (c, h):
            raise UserError(
                f"latents.channels={config.latents.channels}, data.resolution={config.data.resolution},"
                f" latents.downsample={config.latents.downsample}: the latents in data.path={latents.where} are"
                f" [{c}, {h}, {h}]"
            )
        return
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


def count_classes(source: Source, num_classes: int) -> str:
    """How many of a run's classes have samples and which have none, as a part of a sentence."""
    names = [*source.classes, *map(str, range(len(source.classes), num_classes))]
    filled = set(source.filled)
    empty = [names[label] for label in range(num_classes) if label not in filled]
    return f"{len(filled)} classes" + (f" (none of {_listed(empty)}; nothing is drawn of these)" if empty else "")


def other_classes(trained: Sequence[str], source: Source) -> str | None:
    """A line about real images whose classes are not those that a run was trained on; None if they are."""
    there = [source.classes[label] for label in source.filled]
    if set(there) == set(trained):
        return None
    return (
        f"{source.where}: has images of {_listed(there)}; samples are drawn of the classes that the run was trained on,"
        f" {_listed(trained)}"
    )


def _listed(names: Sequence[str]) -> str:
    """The first few names, and how many there are if that is not all."""
    first = ", ".join(map(printable, names[:10]))
    return first if len(names) <= 10 else f"{first}, ... ({len(names)} classes)"


def load_samples(config: Config, source: Source, indices: Sequence[int] | np.ndarray) -> Tensor:
    """Samples of `source`, not mirrored, latents at their posterior's mean: float32 [N, C, ...]."""
    return data.load_samples(source, indices, loader_spec(config))
