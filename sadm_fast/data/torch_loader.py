"""Micro-batches through torch's DataLoader and Pillow: the reference for the DALI loader.

Same order, same interface, and pixel for pixel the ADM crop.
"""

import multiprocessing
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from sadm_fast.data.adm_crop import read_crop
from sadm_fast.data.batch import ImageBatch, pixels_to_float, stack_crops
from sadm_fast.data.image_folder import ImageFolder, pixel_problem
from sadm_fast.data.order import MicroBatchPlan
from sadm_fast.errors import UserError

Request = tuple[int, int, bool]  # sample id, image index, whether to mirror
Sample = tuple[np.ndarray, int, int] | str  # crop [S, S, C], label, sample id; or what is wrong with the file
Collated = tuple[torch.Tensor, torch.Tensor, torch.Tensor] | str


class TorchLoader:
    """An endless iterator of ImageBatch on `device`: the micro-batches of `plan`, read by worker processes.

    `threads` is their number; 0 reads in this process. Each worker works `prefetch` micro-batches ahead.
    Raises UserError that names the file when one cannot be decoded or is smaller than the crop. Call close()
    (or leave the `with` block) to end the processes.
    """

    def __init__(
        self,
        folder: ImageFolder,
        plan: MicroBatchPlan,
        *,
        resolution: int,
        channels: int,
        threads: int = 2,
        prefetch: int = 2,
        device: str | torch.device = "cpu",
    ) -> None:
        self._device = torch.device(device)
        # Not fork: by now torch and DALI have threads, and a lock that one of them holds is never freed in the child.
        multiprocessing.set_forkserver_preload([__name__])
        loader: DataLoader[Sample] = DataLoader(
            _Crops(folder, resolution, channels),
            batch_sampler=_Requests(plan),
            num_workers=threads,
            multiprocessing_context="forkserver" if threads else None,
            prefetch_factor=prefetch if threads else None,
            collate_fn=_collate,
            pin_memory=self._device.type == "cuda",
            generator=torch.Generator(),  # otherwise each start would draw from the program's own generator
        )
        self._batches: Iterator[Collated] | None = iter(loader)

    def __iter__(self) -> "TorchLoader":
        return self

    def __next__(self) -> ImageBatch:
        if self._batches is None:
            raise StopIteration
        collated = next(self._batches)
        if isinstance(collated, str):
            self.close()
            raise UserError(collated)
        pixels, labels, sample_ids = (part.to(self._device, non_blocking=True) for part in collated)
        return ImageBatch(pixels_to_float(pixels), labels, sample_ids)

    def close(self) -> None:
        """End the worker processes; batches already yielded stay valid. May be called twice."""
        self._batches = None

    def __enter__(self) -> "TorchLoader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Requests(Sampler[list[Request]]):
    """The plan as the endless list of requests that DataLoader sends to its workers."""

    def __init__(self, plan: MicroBatchPlan) -> None:
        self._plan = plan

    def __iter__(self) -> Iterator[list[Request]]:
        position = 0
        while True:
            wanted = self._plan[position]
            yield list(zip(wanted.sample_ids.tolist(), wanted.indices.tolist(), wanted.mirror.tolist(), strict=True))
            position += 1


class _Crops(Dataset[Sample]):
    """Reads what a request names. Problems are returned: raised, DataLoader buries them in a traceback."""

    def __init__(self, folder: ImageFolder, resolution: int, channels: int) -> None:
        self._folder, self._resolution, self._channels = folder, resolution, channels

    def __getitem__(self, request: Request) -> Sample:
        sample_id, index, mirror = request
        path = self._folder.path(index)
        try:
            crop = read_crop(path, self._resolution, self._channels)
        except (OSError, SyntaxError, ValueError) as error:
            return pixel_problem(path, self._resolution) or f"{path}: cannot be read ({error})"
        return crop[:, ::-1] if mirror else crop, int(self._folder.labels[index]), sample_id


def _collate(samples: list[Sample]) -> Collated:
    """Samples to tensors (pixels uint8 [B, C, S, S], labels and ids int64 [B]), or the first problem."""
    for sample in samples:
        if isinstance(sample, str):
            return sample
    crops, labels, sample_ids = zip(*samples, strict=True)
    return stack_crops(list(crops)), torch.tensor(labels), torch.tensor(sample_ids)
