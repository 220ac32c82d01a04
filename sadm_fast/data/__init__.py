"""Images in, batches out: open a folder, then iterate over micro-batches in an order fixed by the seed.

Pixels are uint8 on disk and in the loaders, float32 x / 127.5 - 1 in a batch (sadm_fast.data.batch).
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sadm_fast.data.adm_crop import read_crop
from sadm_fast.data.batch import ImageBatch, pixels_to_float, stack_crops
from sadm_fast.data.demo import PREFIX, demo_folder
from sadm_fast.data.image_folder import ImageFolder, pixel_problem
from sadm_fast.data.order import MicroBatchPlan
from sadm_fast.errors import UserError

if TYPE_CHECKING:  # importing DALI takes a second, the loaders are imported when one is made
    from sadm_fast.data.dali_loader import DaliLoader
    from sadm_fast.data.torch_loader import TorchLoader

__all__ = ["ImageBatch", "ImageFolder", "load_images", "make_loader", "open_folder"]


def open_folder(path: str | Path, resolution: int) -> ImageFolder:
    """The images at `path` (a folder root/class/name.ext, or "demo:mnist5k"), listed and checked.

    Raises UserError for everything that would keep it from being trained on (ImageFolder.scan and .check).
    """
    if str(path).startswith(PREFIX):
        path = demo_folder(str(path))
    folder = ImageFolder.scan(path)
    folder.check(resolution)
    return folder


def make_loader(
    folder: ImageFolder,
    *,
    loader: str = "dali",
    resolution: int,
    channels: int,
    flip: bool,
    seed: int,
    micro_batch: int,
    grad_accumulation: int = 1,
    rank: int = 0,
    world_size: int = 1,
    start_iteration: int = 0,
    threads: int = 2,
    prefetch: int = 2,
    device: str | torch.device = "cpu",
) -> "DaliLoader | TorchLoader":
    """An endless iterator of this rank's ImageBatch from start_iteration on; call close() after use.

    loader: "dali", or "torch" (Pillow in worker processes; pixel-exact). channels: 1 or 3. flip: mirror half
    of the samples, chosen by (seed, counter). threads: DALI threads or worker processes. prefetch:
    micro-batches to work ahead. device: where the batch's tensors are; on "cuda" DALI decodes JPEG on the
    GPU. Raises ValueError for arguments out of range, UserError when DALI is not installed.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels={channels}: must be 1 or 3")
    if threads < 1 or prefetch < 1:
        raise ValueError(f"threads={threads}, prefetch={prefetch}: must be at least 1")
    plan = MicroBatchPlan(
        num_images=len(folder),
        seed=seed,
        flip=flip,
        micro_batch=micro_batch,
        grad_accumulation=grad_accumulation,
        rank=rank,
        world_size=world_size,
        start_iteration=start_iteration,
    )
    if loader == "dali":
        try:
            from sadm_fast.data.dali_loader import DaliLoader
        except ImportError as error:
            raise UserError(
                f"data.loader=dali: NVIDIA DALI cannot be imported ({error}); "
                "install nvidia-dali-cuda130 or use --set data.loader=torch"
            ) from error
        return DaliLoader(
            folder,
            plan,
            resolution=resolution,
            channels=channels,
            threads=threads,
            prefetch=prefetch,
            device=device,
        )
    if loader == "torch":
        from sadm_fast.data.torch_loader import TorchLoader

        return TorchLoader(
            folder,
            plan,
            resolution=resolution,
            channels=channels,
            threads=threads,
            prefetch=prefetch,
            device=device,
        )
    raise ValueError(f"loader={loader!r}: must be 'dali' or 'torch'")


def load_images(
    folder: ImageFolder, indices: Sequence[int] | np.ndarray, resolution: int, channels: int, threads: int = 2
) -> Tensor:
    """The ADM crops of the images at `indices`, unflipped: float32 [N, C, resolution, resolution] in [-1, 1].

    Raises UserError that names the first file that cannot be read.
    """

    def read(index: int) -> np.ndarray:
        path = folder.path(int(index))
        try:
            return read_crop(path, resolution, channels)
        except (OSError, SyntaxError, ValueError) as error:
            problem = pixel_problem(path, resolution) or f"{path}: cannot be read ({error})"
            raise UserError(problem) from error

    with ThreadPoolExecutor(threads) as pool:
        crops = list(pool.map(read, indices))
    return pixels_to_float(stack_crops(crops))
