"""Encode images to cached latents. A shard is one unit of work: one rank makes it, and once whole it is kept.

A shard holds the same images, encoded in the same batches, whichever rank makes it. So a killed run that is continued,
on any number of ranks, ends with the same bytes.
"""

import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from sadm_fast.config import Config
from sadm_fast.console import Console
from sadm_fast.data.batch import stack_crops
from sadm_fast.data.broken import read_crop_or_reason
from sadm_fast.data.latents import (
    ENCODING,
    MANIFEST,
    SHARDS,
    Encoding,
    finite_rows,
    shard_name,
    shard_record,
    write_shard,
)
from sadm_fast.data.source import ImageSource
from sadm_fast.errors import UserError
from sadm_fast.feed import loader_spec
from sadm_fast.files import LOCK, locked, parse_json, write_json
from sadm_fast.models.autoencoder import Autoencoder
from sadm_fast.ranks.collectives import barrier, only_on_rank_zero
from sadm_fast.ranks.launch import Place
from sadm_fast.scales import pixels_to_float

_BATCHES_AHEAD = 2
_SKIPPED_LISTED = 500  # names of broken images kept in a shard's record


def check_autoencoder(config: Config, autoencoder: Autoencoder) -> None:
    """UserError unless the autoencoder has the channels and the downsampling of the configuration."""
    assert config.latents is not None
    for key, asked, there in (
        ("latents.channels", config.latents.channels, autoencoder.latent_channels),
        ("latents.downsample", config.latents.downsample, autoencoder.downsample),
        ("data.channels", config.data.channels, autoencoder.image_channels),
    ):
        if asked != there:
            raise UserError(f"{key}={asked}: latents.autoencoder={config.latents.autoencoder} has {there}")


def describe_encoding(config: Config, source: ImageSource, autoencoder: Autoencoder) -> Encoding:
    """Describe the cache that encode() will make of `source`."""
    assert config.latents is not None
    scale, shift = autoencoder.scale
    assert isinstance(scale, float) and isinstance(shift, float)  # an AutoencoderKL's own
    return Encoding(
        source=source.fingerprint(),
        classes=source.classes,
        images=len(source),
        resolution=config.data.resolution,
        image_channels=config.data.channels,
        enlarge=config.data.enlarge,
        autoencoder=autoencoder.identity,
        precision=config.latents.precision,
        scale=scale,
        shift=shift,
        latent_channels=autoencoder.latent_channels,
        downsample=autoencoder.downsample,
        dtype=config.latents.dtype,
        shard_size=config.latents.shard_size,
    )


def encode(config: Config, source: ImageSource, autoencoder: Autoencoder, place: Place, console: Console) -> Path:
    """Encode `source` into data.path, continuing what is there; a complete cache is left alone. Collective.

    Raises UserError: the folder holds something else, cannot be written or is too small; a broken image where
    data.broken is "refuse".
    """
    root = Path(config.data.path)
    encoding = describe_encoding(config, source, autoencoder)
    with ExitStack() as held:
        only_on_rank_zero(lambda: _begin(root, encoding, held))
        return _encode(config, source, autoencoder, encoding, place, console)


def _begin(root: Path, encoding: Encoding, held: ExitStack) -> None:
    """Keep other processes out of the folder, if there is anything to write, and prepare it."""
    try:
        if not (root / MANIFEST).exists() or _missing(root, encoding):
            root.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(root, f"data.path={root}", "is encoding into it; wait for its end, or stop it"))
        _prepare(root, encoding)
    except OSError as error:
        raise UserError(f"data.path={root}: cannot be prepared ({error})") from None


def _missing(root: Path, encoding: Encoding) -> list[int]:
    """The shards that are not there, or not whole."""
    return [shard for shard in range(encoding.shards) if shard_record(root, shard) is None]


def _encode(
    config: Config, source: ImageSource, autoencoder: Autoencoder, encoding: Encoding, place: Place, console: Console
) -> Path:
    root = Path(config.data.path)
    missing = _missing(root, encoding)
    if not missing and (root / MANIFEST).exists():
        console.say(f"{root}: complete already")
        return root
    # Waits until all ranks have looked, so that none sees a shard that another has just made.
    only_on_rank_zero(lambda: _require_room(root, encoding, missing))
    mine = missing[place.rank :: place.world_size]
    console.say(
        f"Encoding {len(source)} images into {root}: {encoding.shards} shards"
        + (f", {encoding.shards - len(missing)} there already" if len(missing) < encoding.shards else "")
    )
    total = sum(len(_images_of(shard, encoding)) for shard in mine)
    with console.bar("images of this rank", total) as bar:
        done = 0
        for shard in mine:
            done = _encode_shard(config, source, autoencoder, encoding, root, shard, place.device, bar.at, done)
    barrier()
    if place.rank == 0:
        records = [shard_record(root, shard) for shard in range(encoding.shards)]
        lost = [shard_name(i) for i, record in enumerate(records) if record is None]
        if lost:
            raise UserError(f"data.path={root}: {lost[0]} has vanished; start again")
        whole = [record for record in records if record is not None]
        count = sum(record["count"] for record in whole)
        write_json(root / MANIFEST, {"encoding": encoding.to_json(), "count": count, "shards": whole})
        left_out = f" ({len(source) - count} broken ones left out)" if count < len(source) else ""
        console.say(f"{root}: {count} images{left_out} in {len(whole)} shards")
    barrier()
    return root


def _prepare(root: Path, encoding: Encoding) -> None:
    """Make the folder, or check that it was begun with this encoding; withdraw the manifest if a shard is missing."""
    try:
        there = None
        if (root / ENCODING).exists():
            there = parse_json((root / ENCODING).read_bytes())
        elif root.exists() and {path.name for path in root.iterdir()} - {LOCK}:
            raise UserError(f"data.path={root}: holds other files; give an empty or a new folder to encode into")
        (root / SHARDS).mkdir(parents=True, exist_ok=True)
        wanted = encoding.to_json()
        begun = any((root / SHARDS).glob("*.safetensors"))
        if there is None or not begun:
            write_json(root / ENCODING, wanted)
        elif there != wanted:
            changed = [key for key in wanted if not isinstance(there, dict) or there.get(key) != wanted[key]]
            raise UserError(
                f"data.path={root}: was begun with another {', '.join(changed)}; continue with the same, or encode"
                " into another folder (--set data.path=...)"
            )
        for leftover in (root / SHARDS).iterdir():  # of a killed run: ours end with .tmp, safetensors' begin with a dot
            if leftover.suffix == ".tmp" or leftover.name.startswith("."):
                leftover.unlink()
        if any(shard_record(root, shard) is None for shard in range(encoding.shards)):
            (root / MANIFEST).unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        raise UserError(f"data.path={root}: cannot be prepared ({error})") from None


def _require_room(root: Path, encoding: Encoding, missing: list[int]) -> None:
    per_image = 2 * 2 * int(np.prod(encoding.latent_shape)) * np.dtype(encoding.dtype).itemsize
    needed = per_image * sum(len(_images_of(shard, encoding)) for shard in missing)
    free = shutil.disk_usage(root).free
    if needed > free:
        raise UserError(
            f"data.path={root}: needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; free some or choose"
            " another folder"
        )


def _images_of(shard: int, encoding: Encoding) -> range:
    first = shard * encoding.shard_size
    return range(first, min(first + encoding.shard_size, encoding.images))


def _encode_shard(
    config: Config,
    source: ImageSource,
    autoencoder: Autoencoder,
    encoding: Encoding,
    root: Path,
    shard: int,
    device: torch.device,
    progress: Callable[[int], None],
    done: int,
) -> int:
    """Encode one shard and write it. progress(done) counts on from `done`; returns the new count of images."""
    assert config.latents is not None
    indices = _images_of(shard, encoding)
    moments = np.empty((len(indices), 2, 2, *encoding.latent_shape), dtype=encoding.dtype)
    kept: list[int] = []
    skipped: list[str] = []
    for batch in _crops(config, source, indices):
        good = [(index, crop) for index, crop in batch if isinstance(crop, np.ndarray)]
        for _, problem in batch:
            if isinstance(problem, str):
                if config.data.broken == "refuse":
                    raise UserError(f"{problem} (or --set data.broken=skip)")
                skipped.append(problem)
        if good:
            images = pixels_to_float(stack_crops([crop for _, crop in good]).to(device))
            # The mirror image is encoded for itself: an autoencoder's convolutions are not symmetric.
            posterior = autoencoder.encode(torch.cat([images, images.flip(-1)]))
            both = torch.stack([posterior.mean, posterior.std], dim=1).unflatten(0, (2, len(good))).transpose(0, 1)
            rows = moments[len(kept) : len(kept) + len(good)]
            _store(both.cpu().numpy(), rows, [source.name(index) for index, _ in good], encoding.precision)
            kept += [index for index, _ in good]
        done += len(batch)
        progress(done)
    try:
        write_shard(root, shard, moments[: len(kept)], source.labels[kept], skipped[:_SKIPPED_LISTED])
    except OSError as error:
        raise UserError(
            f"{root / shard_name(shard)}: cannot be written ({error.strerror or error}); the shards before it are"
            " kept, make room and start again"
        ) from None
    return done


def _store(latents: np.ndarray, out: np.ndarray, names: list[str], precision: str) -> None:
    """Cast latents float32 [n, ...] of images `names` into `out`; UserError if values are not finite in its dtype."""
    with np.errstate(over="ignore"):  # said below, in a line that helps
        out[...] = latents
    for row in np.flatnonzero(~finite_rows(out)).tolist():
        if not np.isfinite(latents[row]).all():
            remedy = "remove the image" if precision == "fp32" else "use --set latents.precision=fp32"
            raise UserError(f"{names[row]}: the autoencoder gives values that are not finite for it; {remedy}")
        raise UserError(
            f"{names[row]}: its latents reach {np.abs(latents[row]).max():.4g}, and latents.dtype={out.dtype} ends at"
            f" {np.finfo(out.dtype).max:.0f}; use --set latents.dtype=float32"
        )


def _crops(
    config: Config, source: ImageSource, indices: range
) -> Iterator[list[tuple[int, np.ndarray | str]]]:  # fmt: skip
    """Yield batches of (image number, its crop uint8 [S, S, C] or why it is broken), read ahead by threads."""
    assert config.latents is not None
    spec = loader_spec(config)

    def read(index: int) -> np.ndarray | str:
        crop = read_crop_or_reason(source, index, spec)
        return f"{source.name(index)}: {crop}" if isinstance(crop, str) else crop

    starts = iter(range(indices.start, indices.stop, config.latents.batch))
    under_way: deque[list[tuple[int, Future[np.ndarray | str]]]] = deque()
    with ThreadPoolExecutor(spec.threads, "crops") as pool:
        while True:
            while len(under_way) <= _BATCHES_AHEAD and (start := next(starts, None)) is not None:
                batch = range(start, min(start + config.latents.batch, indices.stop))
                under_way.append([(index, pool.submit(read, index)) for index in batch])
            if not under_way:
                return
            yield [(index, crop.result()) for index, crop in under_way.popleft()]
