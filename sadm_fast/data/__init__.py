"""Images in, batches out: list a source, then iterate over micro-batches in an order fixed by the seed.

A source says what there is (sadm_fast.data.source), a MicroBatchPlan in which order it is read, a LoaderSpec how.
Nothing here knows of configurations: sadm_fast.feed makes these three from one.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sadm_fast.data import checking, latents
from sadm_fast.data.batch import Loader, LoaderSpec, stack_crops
from sadm_fast.data.broken import read_all_or_replace
from sadm_fast.data.checking import Progress
from sadm_fast.data.demo import PREFIX, demo_folder
from sadm_fast.data.huggingface import TableRows
from sadm_fast.data.image_folder import ImageFolder
from sadm_fast.data.latent_loader import LatentLoader
from sadm_fast.data.latents import ENCODING, MANIFEST, LatentCache, LatentSource
from sadm_fast.data.lightning_latents import LightningLatents, holds_lightning_latents
from sadm_fast.data.mds import INDEX, MdsShards
from sadm_fast.data.order import MicroBatchPlan
from sadm_fast.data.sample_loader import SampleLoader
from sadm_fast.data.samples import SampleSource
from sadm_fast.data.source import ImageSource, Source
from sadm_fast.data.table_files import holds_tables
from sadm_fast.data.webdataset import TarShards
from sadm_fast.errors import UserError
from sadm_fast.files import expand_home
from sadm_fast.scales import pixels_to_float

__all__ = [
    "LoaderSpec",
    "MicroBatchPlan",
    "kind_of",
    "load_samples",
    "make_loader",
    "open_any",
    "open_images",
    "open_source",
    "require_sound",
]


def open_source(path: str | Path, kind: str, progress: Progress | None = None) -> Source:
    """List what lies at `path`, of a kind that data.source names; "latents", or a kind of images. See open_images."""
    if kind != "latents":
        return open_images(path, kind, progress)
    with _other_kind_named(path, kind):
        return _open_latents(path)


def open_images(path: str | Path, kind: str = "folder", progress: Progress | None = None) -> ImageSource:
    """List the images at `path` without opening them (that is require_sound).

    kind "folder": root/class/name.ext, or "demo:mnist5k"; "webdataset": tar shards, whose index is made if it is
    missing; "mds": MosaicML's shards, likewise; "huggingface": Parquet or Arrow tables. progress is called with shards
    done, shards. Raises UserError (ImageFolder.scan, TarShards.scan, MdsShards.scan, TableRows.scan).
    """
    path = expand_home(path)
    with _other_kind_named(path, kind):
        if kind == "webdataset":
            return TarShards.scan(path, progress)
        if kind == "mds":
            return MdsShards.scan(path, progress)
        if kind == "huggingface":
            return TableRows.scan(path, progress)
        if kind != "folder":
            raise ValueError(f"kind={kind!r}: must be 'folder', 'webdataset', 'mds' or 'huggingface'")
        return ImageFolder.scan(demo_folder(path) if path.startswith(PREFIX) else path)


def open_any(path: str, progress: Progress | None = None) -> ImageSource | LatentSource:
    """List what lies at `path`, whatever kind it is (kind_of); UserError as theirs."""
    kind = kind_of(path)
    return _open_latents(path) if kind == "latents" else open_images(path, kind, progress)


def _open_latents(path: str | Path) -> LatentSource:
    root = Path(expand_home(path))
    return LightningLatents.open(root) if holds_lightning_latents(root) else LatentCache.open(root)


def kind_of(path: str | Path) -> str:
    """What data.source says of what lies at `path`, by a look at names; "folder" if nothing tells."""
    root = Path(expand_home(path))
    cached = os.path.exists(root / MANIFEST) or os.path.exists(root / ENCODING)  # False where Path.exists would raise
    if cached or holds_lightning_latents(root):
        return "latents"
    if root.suffix == ".tar" or (os.path.isdir(root) and any(root.glob("*.tar"))):
        return "webdataset"
    if os.path.exists(root / INDEX):
        return "mds"
    return "huggingface" if holds_tables(root) else "folder"


@contextmanager
def _other_kind_named(path: str | Path, kind: str) -> Iterator[None]:
    """Add to a UserError what lies at `path`, if it is of another kind than was asked for."""
    try:
        yield
    except UserError as error:
        found = kind_of(path)
        if found not in (kind, "folder"):
            error.args = (f"{error} (it looks like --set data.source={found})",)
        raise


def require_sound(
    source: Source, spec: LoaderSpec, policy: Literal["refuse", "skip"], progress: Progress | None = None
) -> None:
    """UserError unless `source` can be trained on.

    policy "refuse": every image decodes and is large enough, every shard of latents is as it was written; looked at
    once, then remembered. "skip": more than half of a sample of images look sound; latents are not looked at.
    """
    if isinstance(source, ImageSource):
        checking.require_sound(
            source, spec.resolution, enlarge=spec.enlarge, policy=policy, threads=spec.threads, progress=progress
        )
    elif isinstance(source, LatentSource) and policy == "refuse":
        problems = latents.checked_shards(source, threads=spec.threads, progress=progress)
        if problems:
            raise UserError(problems[0] + (f" (and {len(problems) - 1} more shards)" if len(problems) > 1 else ""))


def make_loader(source: Source, plan: MicroBatchPlan, spec: LoaderSpec, device: str | torch.device = "cpu") -> Loader:
    """An endless iterator of the plan's micro-batches, as ImageBatch on `device`; call close() after use.

    Broken images are replaced and listed in the loader's `broken` (sadm_fast.data.broken). Raises UserError when DALI
    is not installed or spec.decode="mixed" is impossible.
    """
    device = torch.device(device)
    _require_mixed(source, plan)
    if isinstance(source, LatentSource):
        return LatentLoader(source, plan, spec, device)
    if isinstance(source, SampleSource):
        return SampleLoader(source, plan, spec, device)
    if not isinstance(source, ImageSource):
        raise TypeError(f"{type(source).__name__}: there is no loader for this kind of source")
    if spec.decode == "mixed" and device.type != "cuda":
        raise UserError("data.decode=mixed: needs a GPU, and this run is on the CPU; use --set data.decode=auto")
    if spec.decode == "mixed" and spec.loader == "torch":
        raise UserError("data.decode=mixed: data.loader=torch decodes on the CPU; use --set data.loader=dali")
    if spec.loader == "torch":
        from sadm_fast.data.torch_loader import TorchLoader

        return TorchLoader(source, plan, spec, device)
    try:
        from sadm_fast.data.dali_loader import DaliLoader  # importing DALI takes a second
    except ImportError as error:
        raise UserError(
            f"data.loader=dali: NVIDIA DALI cannot be imported ({error}); "
            "install nvidia-dali-cuda130 or use --set data.loader=torch"
        ) from error
    return DaliLoader(source, plan, spec, device)


def _require_mixed(source: Source, plan: MicroBatchPlan) -> None:
    """RuntimeError if batches are sorted by class: the game compares samples of one batch, Psi would learn nothing."""
    shares = np.bincount(source.labels, minlength=len(source.classes)) / len(source)
    together = np.concatenate([source.labels[plan[i].indices] for i in range(4)])
    if shares.max() <= 0.5 and len(together) >= 32 and (together == together[0]).all():  # by chance: under 2^-31
        raise RuntimeError(f"{source.where}: {len(together)} samples in a row are of one class; the order is not mixed")


def load_samples(source: Source, indices: Sequence[int] | np.ndarray, spec: LoaderSpec) -> Tensor:
    """Samples at `indices`, not mirrored: float32 [N, C, ...], images in [-1, 1] or means of scaled latents.

    Broken images are replaced as in a loader. Raises UserError when many in a row are.
    """
    if isinstance(source, LatentSource):
        return source.means(np.asarray(indices, dtype=np.int64))
    if isinstance(source, SampleSource):
        return torch.from_numpy(source.read(np.asarray(indices, dtype=np.int64), np.zeros(len(indices), dtype=bool)))
    if not isinstance(source, ImageSource):
        raise TypeError(f"{type(source).__name__}: there is no reader for this kind of source")
    with ThreadPoolExecutor(spec.threads) as pool:
        crops = read_all_or_replace(source, indices, spec, pool)
    return pixels_to_float(stack_crops([crop.pixels for crop in crops]))
