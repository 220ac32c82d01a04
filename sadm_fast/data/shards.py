"""Shards: files that hold the bytes of many encoded images. They are read in place; nothing is ever unpacked.

Where each image lies is in an index, made when it is missing and kept in the cache folder; the folder of the shards is
never written to.
"""

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np

from sadm_fast.data.paths import open_plain_file
from sadm_fast.data.source import ImageSource, PackedNames, hash_names, printable
from sadm_fast.files import default_cache, remember

MAX_CLASSES = 1 << 20

_OPEN_SHARDS = 64  # descriptors a process keeps; most systems allow it 1024


class ShardIndex(NamedTuple):
    """Where the N images of some shards are."""

    shards: np.ndarray  # int32 [N], which shard
    offsets: np.ndarray  # int64 [N], where in it the image's bytes begin
    sizes: np.ndarray  # int64 [N], how many they are
    labels: np.ndarray  # int64 [N]
    members: PackedNames  # [N], names of the image members

    def take(self, indices: np.ndarray) -> "ShardIndex":
        """The entries at `indices` (int64), in that order."""
        return ShardIndex(
            self.shards[indices],
            self.offsets[indices],
            self.sizes[indices],
            self.labels[indices],
            self.members.take(indices),
        )


class Shard(NamedTuple):
    """One tar file as it was when it was listed."""

    path: str
    size: int
    modified: int  # nanoseconds


@dataclass(frozen=True, eq=False)
class Shards(ImageSource):
    """The images of shards, in the order of the shards and of samples within one."""

    root: Path  # what was scanned
    shards: tuple[Shard, ...]
    index: ShardIndex
    classes: tuple[str, ...]
    labels: np.ndarray = field(init=False)  # int64 [N]

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", self.index.labels)

    @property
    def where(self) -> str:
        return printable(str(self.root))

    def name(self, index: int) -> str:
        return printable(f"{self.shards[self.index.shards[index]].path}: {self.index.members[index]}")

    def read(self, index: int) -> bytes:
        size, offset = int(self.index.sizes[index]), int(self.index.offsets[index])
        shard = self.shards[self.index.shards[index]]
        descriptor = _opened(shard)  # held here: other threads may push it out of the cache
        if os.fstat(descriptor.number).st_size != shard.size:
            raise OSError("the shard's size has changed since it was listed; start again to index it anew")
        encoded = os.pread(descriptor.number, size, offset)
        if len(encoded) < size:
            raise OSError(f"the shard ends {size - len(encoded)} bytes too early")
        return encoded

    def stamp(self) -> str:
        return _stamp(self.shards)

    def subset(self, indices: np.ndarray) -> Self:
        return replace(self, index=self.index.take(indices))

    def fingerprint(self) -> str:
        shard_names = PackedNames.from_iterable(os.path.basename(shard.path) for shard in self.shards)
        digest = hash_names(shard_names, self.index.members)
        digest.update(self.index.shards.astype("<i8").tobytes())
        digest.update(self.index.labels.astype("<i8").tobytes())
        return digest.hexdigest()


def stated(paths: Iterable[str]) -> tuple[Shard, ...]:
    """Files as they are now; OSError if one cannot be looked at."""
    return tuple(Shard(path, (found := os.stat(path)).st_size, found.st_mtime_ns) for path in paths)


def remembered_index(kind: str, shards: tuple[Shard, ...], build: Callable[[], ShardIndex]) -> ShardIndex:
    """The index of an earlier run of `build` for these shards, or a new one, which is kept in the cache folder.

    kind: what is built and by which version of the code.
    """
    identity = hashlib.sha256(f"{kind} {_stamp(shards)}".encode()).hexdigest()[:32]
    path = default_cache() / "index" / f"{identity}.npz"
    index = load_index(path, len(shards))
    if index is None:
        index = build()
        remember(path, dump_index(index))
    return index


def dump_index(index: ShardIndex) -> bytes:
    """The index as the bytes of an .npz file."""
    content = io.BytesIO()
    np.savez(
        content,
        shards=index.shards,
        offsets=index.offsets,
        sizes=index.sizes,
        labels=index.labels,
        members=np.frombuffer(index.members.joined, dtype=np.uint8),
        ends=index.members.ends,
    )
    return content.getvalue()


def load_index(path: Path, num_shards: int) -> ShardIndex | None:
    """The index in an .npz file; None if there is no such file, it is damaged, or it is something else."""
    try:
        with np.load(path, allow_pickle=False) as file:  # zip's checksums find damage
            names = PackedNames(file["members"].tobytes(), file["ends"])
            index = ShardIndex(file["shards"], file["offsets"], file["sizes"], file["labels"], names)
    except (OSError, ValueError, KeyError, EOFError, AttributeError, zipfile.BadZipFile):
        return None
    arrays = (*index[:4], names.ends)
    fits = (
        arrays[0].ndim == 1
        and len({values.shape for values in arrays}) == 1
        and [values.dtype for values in arrays] == [np.int32] + [np.int64] * 4
        and len(names) > 0
        and names.ends[-1] == len(names.joined)
        and index.shards.min() >= 0
        and index.shards.max() < num_shards
        and index.labels.min() >= 0
        and index.labels.max() < MAX_CLASSES
    )
    return index if fits else None


def _stamp(shards: tuple[Shard, ...]) -> str:
    """What tells these shards from others, wherever they lie."""
    return json.dumps([(os.path.basename(path), size, modified) for path, size, modified in shards])


class _Descriptor:
    """An open file that closes itself when nobody reads from it any more."""

    number = -1

    def __init__(self, path: str) -> None:
        self.number = open_plain_file(path)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


@lru_cache(_OPEN_SHARDS)
def _opened(shard: Shard) -> _Descriptor:
    """A shard's descriptor in this process; pread does not move it, so threads and forks may share it."""
    return _Descriptor(shard.path)
