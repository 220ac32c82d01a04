"""Micro-batches through NVIDIA DALI: the order is ours, the reading, decoding and cropping its threads'.

An external source hands DALI the paths of a micro-batch by its position in the plan, so the pipeline has no
state to save: started at another iteration it continues exactly there. On the CPU, DALI decodes bit for bit
as Pillow.
"""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from nvidia.dali.plugin.pytorch import feed_ndarray
from torch import Tensor

from sadm_fast.data.batch import ImageBatch, pixels_to_float
from sadm_fast.data.dali_graph import crop_pipeline
from sadm_fast.data.image_folder import ImageFolder, pixel_problem
from sadm_fast.data.order import MicroBatchPlan
from sadm_fast.errors import UserError


class DaliLoader:
    """An endless iterator of ImageBatch on `device`: the micro-batches of `plan`, decoded by DALI.

    On a CUDA device JPEG decoding is "mixed" (nvJPEG) and resizing runs on that device. `threads` are DALI's
    CPU threads, `prefetch` the micro-batches it works ahead. Raises UserError that names the file when one
    cannot be decoded or is smaller than the crop. Call close() (or leave the `with` block) to end its
    threads.
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
        self._folder, self._plan, self._resolution = folder, plan, resolution
        self._channels, self._threads, self._prefetch = channels, threads, prefetch
        self._device = torch.device(device)
        self._position = 0
        self._halvings = 0
        self._pipeline: Any = self._build()

    def __iter__(self) -> "DaliLoader":
        return self

    def __next__(self) -> ImageBatch:
        if self._pipeline is None:
            raise StopIteration
        pixels, labels, sample_ids, shapes = self._run()
        while (needed := self._halvings_needed(shapes)) > self._halvings:
            # Only now is it known how large the images are. Halvings that no image needs would cost small
            # images a third of their throughput, so the graph is built again with more of them, from this
            # batch on.
            self._halvings = needed
            self._pipeline = self._build()
            pixels, labels, sample_ids, shapes = self._run()
        batch = ImageBatch(
            images=self._images(pixels.as_tensor()),
            labels=torch.from_numpy(_host(labels).copy()).to(self._device),
            sample_ids=torch.from_numpy(_host(sample_ids).copy()).to(self._device),
        )
        self._position += 1
        return batch

    def close(self) -> None:
        """End DALI's threads and free its buffers; batches already yielded stay valid. Twice is fine."""
        self._pipeline = None  # its destructor waits for the work in progress

    def __enter__(self) -> "DaliLoader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _build(self) -> Any:
        on_gpu, device_id = self._device.type == "cuda", None
        if on_gpu:
            device_id = torch.cuda.current_device() if self._device.index is None else self._device.index
        pipeline = crop_pipeline(
            _source(self._folder, self._plan, self._position),
            size=self._resolution,
            channels=self._channels,
            halvings=self._halvings,
            from_paths=True,
            mixed_decode=on_gpu,
            batch_size=self._plan.micro_batch,
            num_threads=self._threads,
            device_id=device_id,
            prefetch_queue_depth=self._prefetch,
        )
        pipeline.build()
        return pipeline

    def _run(self) -> Any:
        try:
            return self._pipeline.run()
        except RuntimeError as error:
            self.close()
            raise self._explain(str(error)) from error

    def _halvings_needed(self, shapes: Any) -> int:
        sides = _host(shapes)[:, :2].min(axis=1)
        if sides.min() < self._resolution:
            self.close()
            raise self._explain("an image is smaller than the crop")
        # A side of size * 2^k up to size * 2^(k+1) - 1 is halved k times; the sides are far below 2^53.
        return int(np.log2(sides.max() // self._resolution))

    def _images(self, pixels: Any) -> Tensor:
        """DALI's uint8 [B, S, S, C], which the next run overwrites, to float32 [B, C, S, S] of our own."""
        if self._device.type == "cuda":
            buffer = torch.empty(pixels.shape(), dtype=torch.uint8, device=self._device)
            feed_ndarray(pixels, buffer, cuda_stream=torch.cuda.current_stream(self._device))
        else:
            buffer = torch.from_numpy(np.asarray(pixels))
        return pixels_to_float(buffer.permute(0, 3, 1, 2).contiguous())

    def _explain(self, reason: str) -> UserError:
        """DALI does not say which file it failed on: look among the micro-batches that were under way."""
        for position in range(self._position, self._position + self._prefetch + 1):
            for index in self._plan[position].indices.tolist():
                problem = pixel_problem(self._folder.path(index), self._resolution)
                if problem:
                    return UserError(problem)
        reason = " ".join(reason.partition("encountered:")[2].split() or reason.split())[:200]  # without its traceback
        return UserError(
            f"data.path={self._folder.root}: DALI failed on images that Pillow reads ({reason}); "
            "use --set data.loader=torch"
        )


def _host(outputs: Any) -> np.ndarray:
    """A uniform CPU output of DALI as an array that is only valid until the next run."""
    return np.asarray(outputs.as_tensor())


def _source(folder: ImageFolder, plan: MicroBatchPlan, start: int) -> Callable[[int], tuple[np.ndarray, ...]]:
    """What DALI asks for its run number `run`: paths uint8 [B, length], labels, sample ids, mirror flags."""
    root = os.path.join(os.fsencode(folder.root.absolute()), b"")

    def micro_batch(run: int) -> tuple[np.ndarray, ...]:
        wanted = plan[start + run]
        names = [os.fsencode(folder.files[i]) for i in wanted.indices.tolist()]
        # One array for the batch is three times cheaper to hand over than one for each path. Repeating the
        # slash between root and name makes the paths equally long and does not change where they lead.
        length = max(map(len, names))
        paths = np.array([root + b"/" * (length - len(name)) + name for name in names])
        return (
            paths.view(np.uint8).reshape(len(names), -1),
            folder.labels[wanted.indices],
            wanted.sample_ids,
            wanted.mirror.astype(np.int32),
        )

    return micro_batch
