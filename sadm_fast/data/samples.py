"""Samples of any shape that need no decoding: arrays in memory, or whatever a subclass of SampleSource reads."""

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from torch import Tensor

from sadm_fast.data.source import Source


class SampleSource(Source):
    """A source whose samples are what the denoiser sees: nothing is decoded, cropped or scaled.

    Attributes:
        shape: [C, ...] of a sample, channels first; () is not allowed.
    """

    shape: tuple[int, ...]

    @abstractmethod
    def read(self, indices: np.ndarray, mirror: np.ndarray) -> np.ndarray:
        """Samples at `indices` int64 [m], reversed along their last axis where mirror, bool [m], is true.

        Returns float32 [m, *shape], an array of its own. Threads and processes may read at once.
        """


class Arrays(SampleSource):
    """Samples that lie in one array, which may be a memory map.

    Args:
        samples: float [N, C, ...], scaled so that the process's sigma_data fits (images: [-1, 1]).
        labels: whole numbers [N] from 0; None: all of one class.
        classes: the name of each label; None: "0" to the largest.
        where: what messages call them.

    Raises:
        ValueError: shapes do not agree, values are not finite, or a label has no name.
    """

    def __init__(
        self,
        samples: np.ndarray | Tensor,
        labels: np.ndarray | Tensor | Sequence[int] | None = None,
        classes: Sequence[str] | None = None,
        where: str = "arrays",
    ) -> None:
        self._samples: np.ndarray[Any, Any] = samples.numpy() if isinstance(samples, Tensor) else samples
        if self._samples.ndim < 2 or not len(self._samples) or self._samples.dtype.kind != "f":
            what = f"{list(self._samples.shape)} of {self._samples.dtype}"
            raise ValueError(f"samples {what}: must be floats [N, C, ...], N at least 1")
        bad = sum(not np.isfinite(self._samples[i : i + 1024]).all() for i in range(0, len(self._samples), 1024))
        if bad:
            raise ValueError("samples: hold values that are not finite; fill or drop them first")
        given = np.zeros(len(self._samples), dtype=np.int64) if labels is None else np.asarray(labels)
        if given.shape != (len(self._samples),) or given.dtype.kind not in "iu" or given.min() < 0:
            raise ValueError(
                f"labels {list(given.shape)} of {given.dtype}: must be [{len(self._samples)}] whole numbers from 0"
            )
        self.labels = given.astype(np.int64)
        highest = int(self.labels.max())
        self.classes = tuple(map(str, range(highest + 1))) if classes is None else tuple(classes)
        if highest >= len(self.classes):
            raise ValueError(f"labels: {highest} is there, and only {len(self.classes)} classes are named")
        self.shape = tuple(self._samples.shape[1:])
        self._where = where
        self._rows = np.arange(len(self.labels))
        digest = hashlib.sha256(f"{self._samples.dtype.str} {self._samples.shape} {self.classes}".encode())
        for i in range(0, len(self._samples), 1024):
            digest.update(np.ascontiguousarray(self._samples[i : i + 1024]).tobytes())
        digest.update(self.labels.astype("<i8").tobytes())
        self._contents = digest.hexdigest()

    @property
    def where(self) -> str:
        return self._where

    def name(self, index: int) -> str:
        return f"{self._where}[{self._rows[index]}]"

    def fingerprint(self) -> str:
        """SHA-256 (hex) over the values, the labels, the names of classes and the chosen rows."""
        return hashlib.sha256(self._contents.encode() + self._rows.astype("<i8").tobytes()).hexdigest()

    def subset(self, indices: np.ndarray) -> Self:
        chosen = object.__new__(type(self))
        chosen.__dict__.update(self.__dict__, _rows=self._rows[indices], labels=self.labels[indices])
        return chosen

    def read(self, indices: np.ndarray, mirror: np.ndarray) -> np.ndarray:
        found = self._samples[self._rows[indices]].astype(np.float32)
        found[mirror] = found[mirror][..., ::-1]
        return found
