"""MosaicML's MDS: index.json and shards of samples, read in place.

A shard, all numbers little-endian uint32:

    samples, then where each sample begins and where the last one ends: samples + 1 offsets in the file
    the columns once more, as JSON
    each sample: the size of each column that has no fixed one, then the columns' bytes, in the order of index.json

The reader of mosaicml-streaming needs numpy below 2.2, and with it come the clients of four clouds; its layout is small
and documented (https://docs.mosaicml.com/projects/streaming), so it is read here.
"""

import json
import os
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sadm_fast.data.checking import Progress
from sadm_fast.data.paths import folder_problem
from sadm_fast.data.shards import MAX_CLASSES, Shard, ShardIndex, Shards, remembered_index, stated
from sadm_fast.data.source import PackedNames, printable
from sadm_fast.data.table_columns import IMAGES, LABELS, one_of
from sadm_fast.errors import UserError

INDEX = "index.json"

_VERSION = "mds 1"  # of the remembered indices
_THREADS = 16  # more than cores: making an index is waiting for a few bytes of each sample
_ENCODED = ("jpeg", "png")
_PIXELS = "pil"  # width, height and length of the mode uint32, the mode, the pixels
_NUMBERS = ("int", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")  # int: int64
_PNM = {"L": b"P5", "RGB": b"P6"}


class Columns(NamedTuple):
    """The columns of every sample, in their order, and which of them are read."""

    names: tuple[str, ...]
    encodings: tuple[str, ...]
    sizes: tuple[int | None, ...]  # bytes; None: in the sample
    image: int
    label: int | None  # None: there is no column besides the image


@dataclass(frozen=True, eq=False)
class MdsShards(Shards):
    """The images of MDS shards, in the order of index.json and of samples within one."""

    pixels: bool = False  # whether images are stored as pixels, not encoded

    def read(self, index: int) -> bytes:
        stored = super().read(index)
        return _as_pnm(stored) if self.pixels else stored

    @staticmethod
    def scan(path: str | Path, progress: Progress | None = None) -> "MdsShards":
        """List the shards of a folder by its index.json; with the index of an earlier scan if there is one.

        Making the index reads the sizes and the label of each sample; progress is then called with (shards done,
        shards). Classes are "0" to the largest label. Raises UserError: no index.json, or not one of MDS; a shard is
        missing, compressed or damaged; no column of images or labels; a label that is no class.
        """
        root = Path(path)
        columns, listed = _read_index(root)
        where = printable(str(root))
        try:
            shards = stated(str(root / name) for name, _ in listed)
        except FileNotFoundError as error:
            raise UserError(_missing(where, Path(error.filename))) from None
        except OSError as error:
            name = printable(error.filename)
            raise UserError(f"data.path={where}: {name} cannot be read ({error.strerror})") from None
        for shard, (_, size) in zip(shards, listed, strict=True):
            if shard.size != size:
                raise UserError(
                    f"{printable(shard.path)}: has {shard.size} bytes, and {INDEX} says {size}; fetch it again"
                )

        def build() -> ShardIndex:
            parts = []
            with ThreadPoolExecutor(_THREADS) as pool:
                for part in pool.map(lambda shard: _index_shard(shard, columns), shards):
                    parts.append(part)
                    if progress is not None:
                        progress(len(parts), len(shards))
            counts = [len(labels) for _, _, labels in parts]
            offsets, sizes, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
            names = PackedNames.from_iterable(f"sample {i}" for count in counts for i in range(count))
            return ShardIndex(np.repeat(np.arange(len(shards), dtype=np.int32), counts), offsets, sizes, labels, names)

        index = remembered_index(f"{_VERSION} {columns}", shards, build)
        if not len(index.labels):
            raise UserError(f"data.path={where}: the shards hold no samples; give some that do")
        classes = ("all",) if columns.label is None else tuple(map(str, range(int(index.labels.max()) + 1)))
        return MdsShards(root, shards, index, classes, columns.encodings[columns.image] == _PIXELS)


def _read_index(root: Path) -> tuple[Columns, list[tuple[str, int]]]:
    """The columns, and name and size of each shard."""
    where, name = printable(str(root)), printable(str(root / INDEX))
    if problem := folder_problem(str(root)):
        raise UserError(f"data.path={where}: {problem}; give the folder that {INDEX} lies in")
    try:
        shards = json.loads((root / INDEX).read_bytes())["shards"]
        for shard in shards:
            if (shard["format"], shard["version"]) != ("mds", 2):
                raise ValueError(f"a shard of format {shard['format']!r}, version {shard['version']!r}, not 'mds', 2")
        described = {
            (tuple(shard["column_names"]), tuple(shard["column_encodings"]), tuple(shard["column_sizes"]))
            for shard in shards
        }
        listed = [(str(shard["raw_data"]["basename"]), int(shard["raw_data"]["bytes"])) for shard in shards]
        if outside := [name for name, _ in listed if os.path.basename(name) != name]:
            raise ValueError(f"a shard {outside[0]!r} outside of the folder")
        if len(described) > 1:
            raise ValueError("shards of different columns")
    except FileNotFoundError:
        splits = sorted(found.parent.name for found in root.glob(f"*/{INDEX}"))
        one = f"give one of its splits, {printable(', '.join(splits))}" if splits else "give the folder that it lies in"
        raise UserError(f"data.path={where}: has no {INDEX}; {one}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = printable(" ".join(str(error).split())[:200])
        raise UserError(f"{name}: not the index of MDS shards ({reason}); write it again") from None
    if not described:
        raise UserError(f"{name}: names no shards; give a data set that has some")
    return _choose(name, *described.pop()), listed


def _choose(file: str, names: Sequence[str], encodings: Sequence[str], sizes: Sequence[int | None]) -> Columns:
    """The columns to read; `file` describes them."""
    kinds = dict(zip(names, encodings, strict=True))
    images = [name for name in names if kinds[name] in (*_ENCODED, _PIXELS)]
    images = images or [name for name in names if kinds[name] == "bytes"]
    image = one_of(images, (*IMAGES, "x"))
    numbers = [name for name in names if kinds[name] in _NUMBERS]
    label = next((name for name in (*LABELS, "y") if name in numbers), None)
    there = printable(", ".join(f"{name} ({kind})" for name, kind in kinds.items()))
    if image is None:
        raise UserError(
            f"{file}: has {'several columns' if images else 'no column'} of images; one must be"
            f" {', '.join(_ENCODED)}, {_PIXELS} or bytes, and be called image or x if there are more; there are {there}"
        )
    if label is None and len(names) > 1:
        raise UserError(
            f"{file}: has no column of labels; one must hold whole numbers (int) and be called"
            f" label or y; to train without labels, write the column {image} alone; there are {there}"
        )
    position = list(names).index
    return Columns(
        tuple(names), tuple(encodings), tuple(sizes), position(image), None if label is None else position(label)
    )


def _missing(where: str, shard: Path) -> str:
    """Why a shard is not there, as a message."""
    packed = sorted(found.name for found in shard.parent.glob(f"{shard.name}.*"))
    if not packed:
        return f"data.path={where}: {printable(shard.name)} is missing; fetch it again"
    return (
        f"data.path={where}: the shards are compressed ({printable(packed[0])}), and a sample cannot be read from the"
        f" middle; unpack them once (zstd -d FILE.zstd -o FILE), beside {INDEX}"
    )


def _index_shard(shard: Shard, columns: Columns) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each sample's image where it begins and its size, and the label: int64 [samples] each."""
    where = printable(shard.path)
    try:
        data = np.memmap(shard.path, np.uint8, "r")
        count = int(data[:4].view("<u4")[0])
        ends = data[4 : 4 * (count + 2)].view("<u4").astype(np.int64)
    except PermissionError:
        raise UserError(f"{where}: no permission to read it; fix with chmod a+r") from None
    except (OSError, ValueError, IndexError) as error:
        raise UserError(f"{where}: is not an MDS shard ({error}); fetch or write it again") from None
    begin, end = ends[:-1], ends[1:]
    own = 4 * sum(size is None for size in columns.sizes)  # bytes of the sizes before the columns
    whole = len(ends) == count + 1 and ends[0] >= 4 * (count + 2) and ends[-1] <= len(data)
    if not whole or (end - begin < own).any():
        raise UserError(f"{where}: is not an MDS shard (its offsets are wrong); fetch or write it again")
    given = _gather(data, begin, own).view("<u4").astype(np.int64)  # [count, columns without a size]
    fixed = iter(range(given.shape[1]))
    sizes = [given[:, next(fixed)] if size is None else np.full(count, size) for size in columns.sizes]
    starts = begin + own + np.cumsum([np.zeros_like(begin), *sizes], axis=0)  # [columns + 1, count]
    if len(bad := np.flatnonzero(starts[-1] != end)):
        raise UserError(f"{where}: sample {bad[0]} is not as long as its columns; fetch or write the shard again")
    labels = np.zeros(count, dtype=np.int64)
    if columns.label is not None:
        encoding = columns.encodings[columns.label]
        kind = np.dtype("int64" if encoding == "int" else encoding).newbyteorder("<")
        labels = _gather(data, starts[columns.label], kind.itemsize).view(kind)[:, 0].astype(np.int64)
    if len(bad := np.flatnonzero((labels < 0) | (labels >= MAX_CLASSES))):
        raise UserError(
            f"{where}: sample {bad[0]} has label {labels[bad[0]]}; it must be a class number below {MAX_CLASSES}"
        )
    return starts[columns.image], sizes[columns.image], labels


def _gather(data: np.ndarray, starts: np.ndarray, size: int) -> Any:
    """`size` bytes from each start: uint8 [len(starts), size]."""
    return np.ascontiguousarray(data[starts[:, None] + np.arange(size)])


def _as_pnm(stored: bytes) -> bytes:
    """Pixels as MDS's `pil` stores them, as a PGM or PPM file; OSError if they are of another mode, or too few."""
    try:
        width, height, length = struct.unpack("<3I", stored[:12])
        mode = stored[12 : 12 + length].decode("ascii", "replace")
    except struct.error:
        raise OSError("the image is cut off") from None
    pixels = stored[12 + length :]
    if mode not in _PNM:
        raise OSError(f"the pixels are of mode {mode!r}; write them as RGB, L, or as PNG")
    if len(pixels) != width * height * len(mode):
        raise OSError(f"{len(pixels)} bytes are not {width}x{height} pixels of {mode}")
    return _PNM[mode] + f" {width} {height} 255\n".encode() + pixels
