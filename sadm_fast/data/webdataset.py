"""WebDataset shards: tar files of images and labels, read in place; nothing is ever unpacked.

Where each image lies is in an index (sadm_fast.data.tar_index), made when it is missing and kept in the cache
folder; the folder of the shards is never written to.
"""

import hashlib
import json
import os
import stat
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sadm_fast.data.checking import Progress
from sadm_fast.data.paths import broken_link, open_plain_file
from sadm_fast.data.source import ImageSource, PackedNames, hash_names, printable
from sadm_fast.data.tar_index import TarIndex, build_index, dump_index, load_index
from sadm_fast.errors import UserError
from sadm_fast.files import default_cache, remember

_VERSION = 2  # of the remembered indices
_OPEN_SHARDS = 64  # descriptors a process keeps; most systems allow it 1024


class Shard(NamedTuple):
    """One tar file as it was when it was listed."""

    path: str
    size: int
    modified: int  # nanoseconds


@dataclass(frozen=True, eq=False)
class TarShards(ImageSource):
    """The images of WebDataset shards, in the order of shard names and of members within one."""

    root: Path  # what was scanned: a folder of shards, or one
    shards: tuple[Shard, ...]
    index: TarIndex
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

    def subset(self, indices: np.ndarray) -> "TarShards":
        return replace(self, index=self.index.take(indices))

    def fingerprint(self) -> str:
        shard_names = PackedNames.from_iterable(os.path.basename(shard.path) for shard in self.shards)
        digest = hash_names(shard_names, self.index.members)
        digest.update(self.index.shards.astype("<i8").tobytes())
        digest.update(self.index.labels.astype("<i8").tobytes())
        return digest.hexdigest()

    @staticmethod
    def scan(path: str | Path, progress: Progress | None = None) -> "TarShards":
        """List the shards of a folder (*.tar, by name) or one shard; with the index of an earlier scan if there is one.

        Making the index reads all tar headers; progress is then called with (shards done, shards). Classes are
        "0" to the largest label. Raises UserError: no such path, no *.tar in it, no permission, and all that
        build_index raises.
        """
        root = Path(path)
        shards = _list_shards(root)
        identity = hashlib.sha256(f"{_VERSION} {_stamp(shards)}".encode()).hexdigest()[:32]
        remembered = default_cache() / "index" / f"{identity}.npz"
        index = load_index(remembered, len(shards))
        if index is None:
            index = build_index([shard.path for shard in shards], progress)
            remember(remembered, dump_index(index))
        classes = tuple(str(label) for label in range(int(index.labels.max()) + 1))
        return TarShards(root, shards, index, classes)


def _list_shards(root: Path) -> tuple[Shard, ...]:
    where = printable(str(root))
    try:
        status = os.stat(root)
        paths = [str(root)]
        if stat.S_ISDIR(status.st_mode):
            paths = sorted(str(entry) for entry in root.iterdir() if _is_shard(entry))
        if not paths:
            raise UserError(
                f"data.path={where}: has no .tar files; give the folder that the shards lie in "
                "(for a folder of class folders: --set data.source=folder)"
            )
        return tuple(Shard(path, (found := os.stat(path)).st_size, found.st_mtime_ns) for path in paths)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        path = getattr(error, "filename", None) or str(root)
        name = printable(str(path))
        if isinstance(error, PermissionError):
            what = f"no permission to list {name}; fix with chmod a+rx {name}"
        elif isinstance(error, OSError) and (link := broken_link(str(path), error)):
            what = f"{name} is a {link}; remove it, or bring back what it leads to"
        elif isinstance(error, FileNotFoundError | NotADirectoryError | ValueError):
            what = "no such file or folder; give a folder of .tar shards or one .tar file"
        else:
            what = f"{name} cannot be read ({error.strerror}); remove it"
        raise UserError(f"data.path={where}: {what}") from None


def _is_shard(entry: Path) -> bool:
    return entry.suffix == ".tar" and not entry.name.startswith(".")


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
