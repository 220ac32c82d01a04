"""Sources: samples with classes, listed once, read by number.

A source knows nothing of order, flips, crops or batches: those are of the plan and the loader.
"""

import hashlib
import os
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Self, TypeVar

import numpy as np
import torch

from sadm_fast.counters import Purpose, uniform
from sadm_fast.errors import UserError


@dataclass(frozen=True, eq=False)
class PackedNames:
    """File-system names in one bytes object: 1.3 million str would take 130 MB and a second to pickle.

    Name i is joined[ends[i - 1] + 1 : ends[i]], decoded as os.fsdecode does (any name comes back as it was).
    """

    joined: bytes  # the names as the file system has them, a NUL between two
    ends: np.ndarray  # int64 [len(self)], where each name ends in `joined`

    @staticmethod
    def from_iterable(names: Iterable[str]) -> "PackedNames":
        """The names in their order; none of them may hold a NUL, as no file name does."""
        joined, ends = bytearray(), array("q")
        for name in names:
            joined += os.fsencode(name)
            ends.append(len(joined))
            joined.append(0)
        return PackedNames(bytes(joined[:-1]), np.array(ends, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self.encoded(index))

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    def encoded(self, index: int) -> bytes:
        """Name `index` (negative: from the end) as the file system has it."""
        index = range(len(self))[index]
        start = self.ends[index - 1] + 1 if index else 0
        return self.joined[start : self.ends[index]]

    def take(self, indices: np.ndarray) -> "PackedNames":
        """The names at `indices` (int64), in that order."""
        joined, ends = bytearray(), array("q")
        for index in indices.tolist():
            joined += self.encoded(index)
            ends.append(len(joined))
            joined.append(0)
        return PackedNames(bytes(joined[:-1]), np.array(ends, dtype=np.int64))


class Source(ABC):
    """Samples with classes: sample i has class labels[i], an index into `classes`. A class may have no samples.

    A new kind of source gives what is abstract here, or in ImageSource if its samples are encoded images: then both
    loaders, the check, encode.py and the bench work with it. Resumed runs and runs of several ranks rely on this:

    - one path lists the same samples in the same order on every rank and at every start;
    - whatever changes that list changes `fingerprint`: a run only continues with the data it began with;
    - a source is cheap to pickle and reading has no state: any index, in any order, from several threads and processes.
    """

    labels: np.ndarray  # int64 [len(self)]
    classes: tuple[str, ...]

    @property
    @abstractmethod
    def where(self) -> str:
        """The path that the samples come from, for messages."""

    @abstractmethod
    def name(self, index: int) -> str:
        """What a message calls a sample: where a person finds it."""

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 (hex) over what the samples are called and their labels: the same wherever they lie."""

    @abstractmethod
    def subset(self, indices: np.ndarray) -> Self:
        """The samples at `indices` (int64), in that order, with the same classes."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def filled(self) -> list[int]:
        """The classes that have samples, ascending. Shards may lack labels, a cache may have lost all of a class."""
        return np.unique(self.labels).tolist()


class ImageSource(Source):
    """A source whose samples are encoded images (JPEG, PNG, ...)."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The encoded image. Raises OSError if it cannot be read. Threads and processes may read at once."""

    @abstractmethod
    def stamp(self) -> str:
        """A text that changes when files are added, removed or renamed; without reading any of them."""


S = TypeVar("S", bound=Source)


def split(source: S, fraction: float, seed: int) -> tuple[S, S]:
    """(rest, held_out): about `fraction` of every class is held out, chosen by (seed, list position).

    A class gives round(fraction * its size) samples and always keeps one. Raises ValueError unless
    0 < fraction < 1, UserError when that leaves nothing held out.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction={fraction}: must lie between 0 and 1")
    draw = uniform(seed, Purpose.SPLIT, torch.arange(len(source)))[:, 0].numpy()
    by_class = np.lexsort((draw, source.labels))
    counts = np.bincount(source.labels, minlength=len(source.classes))
    rank_in_class = np.arange(len(source)) - np.repeat(np.cumsum(counts) - counts, counts)
    wanted = np.minimum(np.round(fraction * counts), counts - 1)
    held = np.zeros(len(source), dtype=bool)
    held[by_class] = rank_in_class < np.repeat(wanted, counts)
    if not held.any():
        raise UserError(
            f"data.path={source.where}: {len(source)} images in {len(source.classes)} classes are too few to "
            f"hold out {fraction:g} of each class"
        )
    return source.subset(np.flatnonzero(~held)), source.subset(np.flatnonzero(held))


def printable(name: str) -> str:
    """A file's name as one line that any terminal takes: what cannot be shown (line ends, odd bytes) is escaped."""
    return name if name.isprintable() else repr(name)[1:-1]


def hash_names(*lists: PackedNames) -> "hashlib._Hash":
    """A SHA-256 that has taken in the lists, each with an end mark that no name can imitate."""
    digest = hashlib.sha256()
    for names in lists:
        digest.update(names.joined)
        digest.update(b"\0\0")
    return digest
