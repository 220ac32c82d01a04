"""Micro-batches through NVIDIA DALI, in the order of our plan.

An external source hands DALI the encoded images of a micro-batch by its position in the plan, so the pipeline has no
state to save: a new one, started at any position, continues exactly there. Our own threads read the files and decode
those that DALI may not (sadm_fast.data.dali_kinds). On the CPU, DALI decodes the others to Pillow's bits and our
threads crop (fast_crop: DALI's resize takes three times as long). On a GPU the crop is part of DALI's graph. The next
micro-batch is made while one is used.

A pipeline that meets a broken image fails as a whole and does not say which image it was. Then Pillow decodes the
micro-batches under way to find it, and a new pipeline starts at the same position without that image. If Pillow finds
all of them sound, twice, it decodes the images of that micro-batch from then on.

A micro-batch goes through the pipeline in runs of at most 31 images. From 32 on, DALI 2.4 prepares the decoding in
several threads, and an image whose header it cannot read soon ends the process with a segmentation fault there (seen
within seconds with one damaged PNG in 36; never in thousands of failing runs of 31).
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from nvidia.dali.plugin.pytorch import feed_ndarray
from PIL import Image
from torch import Tensor

from sadm_fast.data.adm_crop import fast_crop
from sadm_fast.data.batch import ImageBatch, ImageMemory, LoaderSpec
from sadm_fast.data.broken import BrokenImages, read_all_or_replace
from sadm_fast.data.checking import too_small
from sadm_fast.data.dali_graph import crop_pipeline, decode_pipeline
from sadm_fast.data.dali_kinds import decoded_by_pillow, for_dali
from sadm_fast.data.order import MicroBatchPlan
from sadm_fast.data.source import ImageSource
from sadm_fast.errors import UserError
from sadm_fast.scales import pixels_to_float

_MAX_RUN = 31

_UNKNOWN, _DALI, _PILLOW = range(3)  # who decodes an image
_REFUSED = b"\0"  # no image to DALI: makes it fail, so that the reason is looked for

Feed = Callable[[int], tuple[Any, ...]]  # what DALI calls for run 0, 1, ... (dali_graph.crop_pipeline)


class DaliLoader:
    """An endless iterator of ImageBatch on `device`: the micro-batches of `plan`, decoded by DALI.

    On a GPU, unless spec.decode is "cpu", JPEG is decoded by nvJPEG and cropped there; otherwise on the CPU, and
    the crops are copied. spec.threads are DALI's CPU threads (and as many that crop or read shards), spec.prefetch
    the micro-batches that are decoded ahead. Broken images are replaced (sadm_fast.data.broken) and listed
    in `broken`; UserError when there are too many. Call close() (or leave the `with` block) to end its threads.
    """

    def __init__(
        self,
        source: ImageSource,
        plan: MicroBatchPlan,
        spec: LoaderSpec,
        device: torch.device,
    ) -> None:
        self._source, self._plan, self._spec, self._device = source, plan, spec, device
        self._threads, self._prefetch = spec.threads, spec.prefetch
        self._mixed_decode = device.type == "cuda" and spec.decode != "cpu"
        self._memory = ImageMemory()
        size, runs = plan.micro_batch, -(-plan.micro_batch // _MAX_RUN)
        self._parts = [slice(size * run // runs, size * (run + 1) // runs) for run in range(runs)]
        self._broken = BrokenImages(source)
        self._decoder = np.zeros(len(source), dtype=np.uint8)  # of each image; told by its first reading
        self._readers = ThreadPoolExecutor(spec.threads, "readers")
        self._croppers = ThreadPoolExecutor(spec.threads, "crops")
        self._ahead = ThreadPoolExecutor(1, "micro-batch")  # all below belongs to its thread, once it is started
        self._coming: Future[ImageBatch] | None = None
        self._position = 0
        self._halvings = 0
        self._pipeline: Any = None
        self._build()

    @property
    def broken(self) -> dict[str, str]:
        """The images that could not be read so far: name -> reason; it runs one micro-batch ahead."""
        return dict(self._broken.reasons)

    def __iter__(self) -> "DaliLoader":
        return self

    def __next__(self) -> ImageBatch:
        if self._pipeline is None:
            raise StopIteration
        try:
            batch = (self._coming or self._ahead.submit(self._make)).result()
        except UserError:
            self.close()
            raise
        self._coming = self._ahead.submit(self._make)
        return batch

    def close(self) -> None:
        """End the threads and free DALI's buffers; batches already yielded stay valid. Twice is fine."""
        for pool in (self._ahead, self._croppers, self._readers):
            pool.shutdown(cancel_futures=True)
        self._coming = None
        self._pipeline = None  # its destructor waits for the work in progress

    def __enter__(self) -> "DaliLoader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _build(self) -> None:
        """A pipeline from self._position on."""
        self._pipeline = None  # first free the old one's buffers
        device_id = None
        if self._mixed_decode:
            device_id = torch.cuda.current_device() if self._device.index is None else self._device.index
        graph: Any = decode_pipeline
        options: dict[str, Any] = {}
        if self._mixed_decode:
            graph = crop_pipeline
            options |= {"size": self._spec.resolution, "channels": self._spec.channels}
            options |= {"halvings": self._halvings, "mixed_decode": True}
        pipeline = graph(
            self._feed(),
            **options,
            batch_size=min(self._plan.micro_batch, _MAX_RUN),
            num_threads=self._threads,
            device_id=device_id,
            prefetch_queue_depth=self._prefetch * len(self._parts),
        )
        pipeline.build()
        self._pipeline = pipeline

    def _make(self) -> ImageBatch:
        """The next micro-batch."""
        batch = self._next()
        self._position += 1
        return batch

    def _next(self) -> ImageBatch:
        """The micro-batch at self._position; builds the pipeline again as often as it takes."""
        transient = True
        while True:
            try:
                images, labels, sample_ids, sides = self._run_mixed() if self._mixed_decode else self._run()
            except RuntimeError as error:
                if not self._find_broken():
                    if not transient:
                        self._leave_to_pillow(error)
                    transient = False  # perhaps the file system hiccuped: once more
                self._build()
                continue
            if self._find_small(sides):
                self._build()
                continue
            if self._mixed_decode and (needed := self._halvings_needed(sides)) > self._halvings:
                # Only now is it known how large the images are. Halvings that no image needs would cost small
                # images a third of their throughput, so the graph is built again with more of them.
                self._halvings = needed
                self._build()
                continue
            return ImageBatch(
                images=images.to(self._device),
                labels=torch.from_numpy(labels).to(self._device),
                sample_ids=torch.from_numpy(sample_ids).to(self._device),
            )

    def _run(self) -> tuple[Tensor, np.ndarray, np.ndarray, np.ndarray]:
        """Images [B, C, S, S], labels [B], sample ids [B] and (height, width) [B, 2] of the micro-batch."""
        size = self._spec.resolution
        images = self._memory.take(self._plan.micro_batch, self._spec.channels, size, size)
        crops = images.numpy()
        parts, sides = [], []
        for part in self._parts:
            decoded, *rest = self._pipeline.run()
            labels, sample_ids, mirror = (_host(outputs).copy() for outputs in rest)
            arrays = [np.asarray(decoded[i]) for i in range(len(labels))]  # valid until the next run
            cropping = [
                self._croppers.submit(_crop, array, size, bool(flip), crop)
                for array, flip, crop in zip(arrays, mirror.tolist(), crops[part], strict=True)
                if self._spec.enlarge or min(array.shape[:2]) >= size
            ]
            for crop in cropping:
                crop.result()
            parts.append((labels, sample_ids))
            sides += [array.shape[:2] for array in arrays]
        labels, sample_ids = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return images, labels, sample_ids, np.array(sides)

    def _run_mixed(self) -> tuple[Tensor, np.ndarray, np.ndarray, np.ndarray]:
        """The same by DALI alone, images on the GPU."""
        size, parts = self._spec.resolution, []
        crops = torch.empty(
            (self._plan.micro_batch, size, size, self._spec.channels), dtype=torch.uint8, device=self._device
        )
        for part in self._parts:
            pixels, *rest = self._pipeline.run()
            stream = torch.cuda.current_stream(self._device)
            feed_ndarray(pixels.as_tensor(), crops[part], cuda_stream=stream)
            parts.append([_host(outputs).copy() for outputs in rest])
        labels, sample_ids, shapes = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        images = pixels_to_float(crops.permute(0, 3, 1, 2).contiguous())
        return images, labels, sample_ids, shapes[:, :2]

    def _find_broken(self) -> bool:
        """Decode the micro-batches under way with Pillow; return whether any image is newly found broken."""
        found: dict[int, str] = {}
        with ThreadPoolExecutor(self._threads) as pool:
            for position in range(self._position, self._position + self._prefetch + 1):
                indices = self._broken.replace(self._plan[position].indices)
                for crop in read_all_or_replace(self._source, np.unique(indices), self._spec, pool):
                    found |= crop.broken
        return self._broken.add(found)

    def _find_small(self, sides: np.ndarray) -> bool:
        """Look for images below the crop by their sides [B, 2] (height, width); return whether any is newly found."""
        small = np.flatnonzero(sides.min(axis=1) < self._spec.resolution)
        if self._spec.enlarge or not len(small):
            return False
        indices = self._broken.replace(self._plan[self._position].indices)
        reasons = {int(indices[i]): too_small(int(sides[i, 1]), int(sides[i, 0]), self._spec.resolution) for i in small}
        return self._broken.add(reasons)

    def _halvings_needed(self, sides: np.ndarray) -> int:
        # A side of size * 2^k up to size * 2^(k+1) - 1 is halved k times; the sides are far below 2^53.
        return int(np.log2(max(1, sides.min(axis=1).max() // self._spec.resolution)))

    def _leave_to_pillow(self, error: RuntimeError) -> None:
        """Let Pillow decode the images of the micro-batch at self._position, at which DALI has failed twice."""
        indices = self._broken.replace(self._plan[self._position].indices)
        if (self._decoder[indices] == _PILLOW).all():  # DALI fails as a whole
            text = str(error)
            reason = " ".join(text.partition("encountered:")[2].split() or text.split())[:200]  # not its traceback
            raise UserError(
                f"data.path={self._source.where}: DALI failed on images that Pillow reads ({reason}); "
                "use --set data.loader=torch"
            ) from error
        self._decoder[indices] = _PILLOW

    def _feed(self) -> Feed:
        """The callable from which DALI gets its images, from self._position on; our own threads read ahead."""
        start = self._position
        reading: dict[int, tuple[list[list[Future[list[np.ndarray]]]], list[np.ndarray]]] = {}

        def read_ahead(position: int) -> None:
            indices, *rest = self._wanted(start + position)
            parts = [np.array_split(indices[part], self._threads) for part in self._parts]
            futures = [[self._readers.submit(self._read, chunk.tolist()) for chunk in chunks] for chunks in parts]
            reading[position] = futures, rest

        def feed(run: int) -> tuple[Any, ...]:
            position, part = divmod(run, len(self._parts))
            for later in range(position, position + self._prefetch + 1):
                if later not in reading:
                    read_ahead(later)
            futures, rest = reading[position]
            if part + 1 == len(self._parts):
                del reading[position]
            encoded = [image for chunk in futures[part] for image in chunk.result()]
            return encoded, *(values[self._parts[part]] for values in rest)

        return feed

    def _read(self, indices: list[int]) -> list[np.ndarray]:
        """Read images as DALI takes them, uint8 [n_i]; a broken one becomes bytes that DALI refuses."""
        return [np.frombuffer(self._read_one(index), dtype=np.uint8) for index in indices]

    def _read_one(self, index: int) -> bytes:
        try:
            encoded = self._source.read(index)
            if self._decoder[index] == _DALI:
                return encoded or _REFUSED
            if self._decoder[index] == _PILLOW:
                return decoded_by_pillow(encoded)
            given, as_it_is = for_dali(encoded)
            self._decoder[index] = _DALI if as_it_is else _PILLOW
            return given
        except Exception:  # a file that is gone, or whatever Pillow raises for damaged ones (see checking.examine)
            return _REFUSED

    def _wanted(self, position: int) -> list[np.ndarray]:
        """Images to read, their labels, sample ids and mirror flags of a micro-batch; each [B]."""
        wanted = self._plan[position]
        indices = self._broken.replace(wanted.indices)
        return [indices, self._source.labels[indices], wanted.sample_ids, wanted.mirror.astype(np.int32)]


def _crop(image: np.ndarray, size: int, mirror: bool, out: np.ndarray) -> None:
    """fast_crop of RGB uint8 [H, W, 3] into out float32 [1 or 3, size, size]; Pillow makes grey of the colours."""
    if len(out) == 1:
        image = np.array(Image.fromarray(image).convert("L"))[:, :, None]
    fast_crop(image, size, mirror, out)


def _host(outputs: Any) -> np.ndarray:
    """A uniform CPU output of DALI as an array that is only valid until the next run."""
    return np.asarray(outputs.as_tensor())
