"""Micro-batches through torch's DataLoader and Pillow: the reference for the DALI loader.

Same order, same interface, and pixel for pixel the ADM crop.
"""

import atexit
from collections.abc import Iterator
from typing import NamedTuple
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from sadm_fast.data.batch import ImageBatch, LoaderSpec, stack_crops
from sadm_fast.data.broken import BrokenImages, read_or_replace
from sadm_fast.data.order import MicroBatchPlan
from sadm_fast.data.source import ImageSource
from sadm_fast.data.workers import end_with_trainer, worker_context
from sadm_fast.errors import UserError
from sadm_fast.scales import pixels_to_float

Request = tuple[int, int, bool]  # sample id, image index, whether to mirror


class Sample(NamedTuple):
    """One sample, as a worker reads it for a request."""

    pixels: np.ndarray  # uint8 [S, S, C], mirrored if that was asked for
    label: int
    sample_id: int
    broken: dict[int, str]  # images that could not be read: index -> reason


class Collated(NamedTuple):
    """One micro-batch, as a worker sends it."""

    pixels: Tensor  # uint8 [B, C, S, S]
    labels: Tensor  # int64 [B]
    sample_ids: Tensor  # int64 [B]
    broken: dict[int, str]


# Loaders to close at exit: workers block the signal by which multiprocessing would end them.
_OPEN: "WeakSet[TorchLoader]" = WeakSet()


@atexit.register
def _close_forgotten() -> None:
    for loader in list(_OPEN):
        loader.close()


class TorchLoader:
    """An endless iterator of ImageBatch on `device`: the micro-batches of `plan`, read by worker processes.

    spec.threads is their number. Each worker works spec.prefetch micro-batches ahead.
    Broken images are replaced (sadm_fast.data.broken) and listed in `broken`; UserError when there are too
    many. Call close() (or leave the `with` block) to end the processes.
    """

    def __init__(
        self,
        source: ImageSource,
        plan: MicroBatchPlan,
        spec: LoaderSpec,
        device: torch.device,
    ) -> None:
        self._device = device
        self._broken = BrokenImages(source)
        loader: DataLoader[Sample | str] = DataLoader(
            _Crops(source, spec),
            batch_sampler=_Requests(plan),
            num_workers=spec.threads,
            multiprocessing_context=worker_context(__name__),
            worker_init_fn=end_with_trainer,
            prefetch_factor=spec.prefetch,
            collate_fn=_collate,
            pin_memory=self._device.type == "cuda",
            generator=torch.Generator(),  # otherwise each start would draw from the program's own generator
        )
        self._batches: Iterator[Collated | str] | None = iter(loader)
        _OPEN.add(self)

    @property
    def broken(self) -> dict[str, str]:
        """The images that could not be read so far: name -> reason."""
        return self._broken.reasons

    def __iter__(self) -> "TorchLoader":
        return self

    def __next__(self) -> ImageBatch:
        if self._batches is None:
            raise StopIteration
        try:
            collated = next(self._batches)
            if isinstance(collated, str):
                raise UserError(collated)
            self._broken.add(collated.broken)
        except UserError:
            self.close()
            raise
        except (RuntimeError, OSError, EOFError) as error:
            # DataLoader has noticed that a worker is gone, or asked it for the memory of a batch and got no answer.
            if isinstance(error, RuntimeError) and "DataLoader worker (pid" not in str(error):
                raise
            self.close()
            raise UserError(
                "data.loader=torch: a worker process was killed, most likely because memory ran out; "
                "use fewer with --set data.threads=1, or --set data.loader=dali"
            ) from error
        pixels, labels, sample_ids = (part.to(self._device, non_blocking=True) for part in collated[:3])
        return ImageBatch(pixels_to_float(pixels), labels, sample_ids)

    def close(self) -> None:
        """End the worker processes; batches already yielded stay valid. May be called twice."""
        self._batches = None

    def __enter__(self) -> "TorchLoader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Requests(Sampler[list[Request]]):
    """The plan's micro-batches, endlessly, as the requests that DataLoader sends to its workers."""

    def __init__(self, plan: MicroBatchPlan) -> None:
        self._plan = plan

    def __iter__(self) -> Iterator[list[Request]]:
        position = 0
        while True:
            wanted = self._plan[position]
            yield list(zip(wanted.sample_ids.tolist(), wanted.indices.tolist(), wanted.mirror.tolist(), strict=True))
            position += 1


class _Crops(Dataset[Sample | str]):
    """The crop that a request names, or the message of a UserError: raised, DataLoader would add its traceback."""

    def __init__(self, source: ImageSource, spec: LoaderSpec) -> None:
        self._source, self._spec = source, spec

    def __getitem__(self, request: Request) -> Sample | str:
        sample_id, index, mirror = request
        try:
            crop = read_or_replace(self._source, index, self._spec)
        except UserError as error:
            return str(error)
        pixels = crop.pixels[:, ::-1] if mirror else crop.pixels
        return Sample(pixels, int(self._source.labels[crop.index]), sample_id, crop.broken)


def _collate(samples: list[Sample | str]) -> Collated | str:
    """Stack samples into tensors; if there is a message among them, return the first."""
    whole: list[Sample] = []
    for sample in samples:
        if isinstance(sample, str):
            return sample
        whole.append(sample)
    pixels, labels, sample_ids, broken = zip(*whole, strict=True)
    merged = {index: reason for found in broken for index, reason in found.items()}
    return Collated(stack_crops(list(pixels)), torch.tensor(labels), torch.tensor(sample_ids), merged)
