"""Images in, batches out: list a source, then iterate over micro-batches in an order fixed by the seed.

Pixels are uint8 on disk and in the loaders, float32 in [-1, 1] in a batch (sadm_fast.scales).
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from sadm_fast.data.batch import ImageBatch, stack_crops
from sadm_fast.data.broken import CropSpec, read_all_or_replace
from sadm_fast.data.checking import CheckReport, Progress, check, checked, forget, require_sound
from sadm_fast.data.demo import PREFIX, demo_folder
from sadm_fast.data.image_folder import ImageFolder
from sadm_fast.data.latents import ENCODING, MANIFEST, LatentSource
from sadm_fast.data.order import MicroBatchPlan
from sadm_fast.data.source import ImageSource, Source, split
from sadm_fast.data.webdataset import TarShards
from sadm_fast.errors import UserError
from sadm_fast.scales import pixels_to_float

if TYPE_CHECKING:  # importing DALI takes a second, the loaders are imported when one is made
    from sadm_fast.data.dali_loader import DaliLoader
    from sadm_fast.data.torch_loader import TorchLoader

__all__ = [
    "CheckReport",
    "ImageBatch",
    "ImageFolder",
    "ImageSource",
    "Source",
    "TarShards",
    "check",
    "checked",
    "forget",
    "load_images",
    "make_loader",
    "open_images",
    "require_sound",
    "split",
]


def open_images(
    path: str | Path, *, kind: Literal["folder", "webdataset"] = "folder", progress: Progress | None = None
) -> ImageSource:
    """The images at `path`, listed but not opened (that is require_sound).

    kind "folder": root/class/name.ext, or "demo:mnist5k"; "webdataset": tar shards, whose index is made if it is
    missing (progress is called with shards done, shards). Raises UserError (ImageFolder.scan, TarShards.scan).
    """
    if kind == "webdataset":
        return TarShards.scan(path, progress)
    if str(path).startswith(PREFIX):
        path = demo_folder(str(path))
    return ImageFolder.scan(path)


def make_loader(
    source: ImageSource,
    *,
    loader: str = "dali",
    resolution: int,
    channels: int,
    flip: bool,
    enlarge: bool = False,
    seed: int,
    micro_batch: int,
    grad_accumulation: int = 1,
    rank: int = 0,
    world_size: int = 1,
    first_sample: int = 0,
    threads: int = 2,
    prefetch: int = 2,
    decode: str = "auto",
    device: str | torch.device = "cpu",
) -> "DaliLoader | TorchLoader":
    """An endless iterator of this rank's ImageBatch from global sample first_sample on; call close() after use.

    loader: "dali", or "torch" (Pillow in worker processes; pixel-exact). channels: 1 or 3. flip: mirror half
    of the samples, chosen by (seed, counter). enlarge: images smaller than the crop are enlarged; otherwise they
    count as broken. first_sample: where an earlier run stopped, counted over all its ranks. threads: DALI
    threads or worker processes. prefetch: micro-batches to work ahead. decode: "mixed" (JPEG on the GPU, DALI
    only), "cpu", or "auto": mixed where there is a GPU. device: where the batch's tensors are.

    Broken images are replaced and listed in the loader's `broken` (sadm_fast.data.broken). Raises ValueError for
    arguments out of range, UserError when DALI is not installed or "mixed" is impossible.
    """
    device = torch.device(device)
    if channels not in (1, 3):
        raise ValueError(f"channels={channels}: must be 1 or 3")
    if threads < 1 or prefetch < 1:
        raise ValueError(f"threads={threads}, prefetch={prefetch}: must be at least 1")
    if loader not in ("dali", "torch"):
        raise ValueError(f"loader={loader!r}: must be 'dali' or 'torch'")
    if decode not in ("auto", "mixed", "cpu"):
        raise ValueError(f"decode={decode!r}: must be 'auto', 'mixed' or 'cpu'")
    if decode == "mixed" and device.type != "cuda":
        raise UserError("data.decode=mixed: needs a GPU, and this run is on the CPU; use --set data.decode=auto")
    if decode == "mixed" and loader == "torch":
        raise UserError("data.decode=mixed: data.loader=torch decodes on the CPU; use --set data.loader=dali")
    plan = MicroBatchPlan(
        num_images=len(source),
        seed=seed,
        flip=flip,
        micro_batch=micro_batch,
        grad_accumulation=grad_accumulation,
        rank=rank,
        world_size=world_size,
        first_sample=first_sample,
    )
    spec = CropSpec(resolution, channels, enlarge)
    if loader == "torch":
        from sadm_fast.data.torch_loader import TorchLoader

        return TorchLoader(source, plan, spec, threads=threads, prefetch=prefetch, device=device)
    try:
        from sadm_fast.data.dali_loader import DaliLoader
    except ImportError as error:
        raise UserError(
            f"data.loader=dali: NVIDIA DALI cannot be imported ({error}); "
            "install nvidia-dali-cuda130 or use --set data.loader=torch"
        ) from error
    return DaliLoader(
        source,
        plan,
        spec,
        threads=threads,
        prefetch=prefetch,
        mixed_decode=device.type == "cuda" and decode != "cpu",
        device=device,
    )


def load_images(
    source: ImageSource,
    indices: Sequence[int] | np.ndarray,
    resolution: int,
    channels: int,
    enlarge: bool = False,
    threads: int = 2,
) -> Tensor:
    """The ADM crops of the images at `indices`, unflipped: float32 [N, C, resolution, resolution] in [-1, 1].

    Broken images are replaced as in a loader. Raises UserError when many in a row are.
    """
    with ThreadPoolExecutor(threads) as pool:
        crops = read_all_or_replace(source, indices, CropSpec(resolution, channels, enlarge), pool)
    return pixels_to_float(stack_crops([crop.pixels for crop in crops]))


def open_any(path: str, progress: Callable[[int, int], None] | None = None) -> ImageSource | LatentSource:
    """Cached latents, WebDataset tar shards or an image folder, by what the folder holds; UserError as theirs."""
    root = Path(path).expanduser()
    if (root / MANIFEST).exists() or (root / ENCODING).exists():
        return LatentSource.open(root)
    shards = root.suffix == ".tar" or (root.is_dir() and any(root.glob("*.tar")))
    return open_images(path, kind="webdataset" if shards else "folder", progress=progress)
