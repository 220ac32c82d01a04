"""Cached latents: what encode.py writes and training reads.

    DIR/encoding.json                 what is being made, of what, with which autoencoder; written first
    DIR/shards/00000.safetensors      moments [n, 2, 2, c, h, w]: (image, mirror) x (mean, std), raw latents
                                      labels  [n] int64
    DIR/shards/00000.json             count, sha256, size and what was left out; written after its shard
    DIR/manifest.json                 encoding.json and all of those; written last: without it there is no cache

The posterior's mean and standard deviation are kept for every image and for its mirror image, so training draws the
sample and the flip anew each time it sees an image. safetensors is a length, a JSON header and the plain bytes of the
tensors: nothing is unpickled, and the file is mapped into memory, so one sample's row of one orientation is one copy.
"""

import hashlib
import json
import math
import mmap
import os
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import save_file
from torch import Tensor

from sadm_fast.data.paths import folder_problem
from sadm_fast.data.source import Source
from sadm_fast.errors import UserError
from sadm_fast.files import default_cache, expand_home, remember, replacing, write_json
from sadm_fast.scales import LatentScale
from sadm_kernels.streams import copy_rows, has_streams

FORMAT = "sadm_fast.latents/1"
MANIFEST = "manifest.json"
ENCODING = "encoding.json"
SHARDS = "shards"

Progress = Callable[[int, int], None]  # shards done, of how many

_DTYPES = ("float16", "float32")
_TENSOR_DTYPES: dict[str, np.dtype[Any]] = {"F16": np.dtype("<f2"), "F32": np.dtype("<f4"), "I64": np.dtype("<i8")}
_CHECKS = 2  # the checks a remembered result stands for; 1 did not ask whether values are finite
_AT_ONCE = 256  # latents that a check holds in memory


@dataclass(frozen=True)
class Encoding:
    """What a cache is made from, and how: the content of encoding.json. A change of any field makes another cache."""

    source: str  # fingerprint of the images
    classes: tuple[str, ...]
    images: int  # in the source; some may be left out as broken
    resolution: int  # side of the crop, pixels
    image_channels: int
    enlarge: bool  # whether images smaller than the crop were enlarged
    autoencoder: str  # identity, sha256 of the weights
    precision: str  # of the autoencoder's arithmetic
    scale: float
    shift: float
    latent_channels: int
    downsample: int
    dtype: str  # of the moments on disk
    shard_size: int  # images of a shard
    pixel_range: tuple[float, float] = (-1.0, 1.0)
    crop: str = "adm"
    format: str = FORMAT

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """[c, h, w]."""
        side = self.resolution // self.downsample
        return self.latent_channels, side, side

    @property
    def shards(self) -> int:
        return -(-self.images // self.shard_size)

    @property
    def space(self) -> dict[str, Any]:
        """What two equal latent spaces have in common; compared with Autoencoder.space."""
        return {"autoencoder": self.autoencoder, "scale": self.scale, "shift": self.shift}

    def to_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(vars(self)))

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """KeyError or TypeError for what is not an encoding of this format."""
        if value["format"] != FORMAT:
            raise KeyError(f"format {value['format']!r}, this code reads {FORMAT!r}")
        fields = {key: value[key] for key in cls.__dataclass_fields__}
        for key in ("classes", "pixel_range"):
            fields[key] = tuple(fields[key])
        if fields["dtype"] not in _DTYPES:
            raise KeyError(f"dtype {fields['dtype']!r}")
        return cls(**fields)


def shard_name(shard: int) -> str:
    """The path of shard number `shard`, relative to the cache's folder."""
    return f"{SHARDS}/{shard:05d}.safetensors"


def write_shard(root: Path, shard: int, moments: np.ndarray, labels: np.ndarray, skipped: list[str]) -> None:
    """Write a shard and then its record; each appears whole or not at all. OSError when the disk is full.

    moments: float [n, 2, 2, c, h, w] as in the module's head. labels: int64 [n].
    """
    path = root / shard_name(shard)
    try:
        with replacing(path) as temporary:
            save_file({"moments": moments, "labels": labels}, temporary)
            with temporary.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                size = file.seek(0, os.SEEK_END)
    except SafetensorError as error:  # how safetensors passes on what the operating system said
        raise OSError(str(error)) from None
    record = {"file": shard_name(shard), "count": len(labels), "size": size, "sha256": digest, "skipped": skipped}
    write_json(path.with_suffix(".json"), record)


def shard_record(root: Path, shard: int) -> dict[str, Any] | None:
    """Read what `write_shard` recorded; None if there is no record or the shard's size is not the recorded one."""
    path = root / shard_name(shard)
    try:
        record = json.loads(path.with_suffix(".json").read_text())
        return record if path.stat().st_size == record["size"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


class LatentSource(Source):
    """Latents in mapped files, each sample and its mirror image; what every layout of data.source=latents shares.

    Attributes:
        files: in the order of their samples.
        pairs: of each file, the images' rows and their mirror images', each [n, k, c, h, w], read-only. k is 2 for mean
            and standard deviation of the posterior, 1 for a latent that is a draw from it.
        latent_shape: [c, h, w].
        scale: between these raw latents and what a denoiser is trained on.
    """

    def __init__(
        self,
        root: Path,
        files: Sequence[Path],
        pairs: Sequence[tuple[np.ndarray, np.ndarray]],
        labels: Sequence[np.ndarray],
        classes: tuple[str, ...],
        scale: LatentScale,
    ) -> None:
        self.root, self.files, self.pairs, self.classes, self.scale = root, files, pairs, classes, scale
        self.labels = np.concatenate(labels)
        self.latent_shape: tuple[int, int, int] = pairs[0][0].shape[2:]
        self._rows = np.arange(len(self.labels))
        counts = np.array([len(of_file) for of_file in labels])
        self._ends = np.cumsum(counts)
        self._starts = self._ends - counts
        self._addresses = np.concatenate(  # of each sample's row, in memory: int64 [2, N], image and mirror image
            [[rows.ctypes.data + rows.strides[0] * np.arange(len(rows)) for rows in pair] for pair in pairs],
            axis=1,
        ).astype(np.int64)

    @property
    @abstractmethod
    def space(self) -> dict[str, Any]:
        """What latents of one space have in common, in JSON values: the autoencoder's identity, None if it is not
        known, and the scale. Compared with Autoencoder.space."""

    @abstractmethod
    def described(self) -> str:
        """What these latents are, for a message."""

    @abstractmethod
    def damage(self, number: int) -> str | None:
        """What is wrong with the contents of file `number`, as one line; None if nothing is."""

    @property
    def where(self) -> str:
        return str(self.root)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.pairs[0][0].dtype

    def name(self, index: int) -> str:
        row = int(self._rows[index])
        number = int(np.searchsorted(self._ends, row, side="right"))
        return f"{self.files[number]}: row {row - int(self._starts[number])}"

    def subset(self, indices: np.ndarray) -> Self:
        chosen = object.__new__(type(self))
        chosen.__dict__.update(
            self.__dict__,
            _rows=self._rows[indices],
            labels=self.labels[indices],
            _addresses=self._addresses[:, indices],
        )
        return chosen

    def read(self, indices: np.ndarray, mirror: np.ndarray, out: np.ndarray) -> None:
        """Copy the rows of samples `indices` int64 [m] into out [m, k, c, h, w].

        mirror: [m]; where it is 1, those of the mirror image.
        """
        mirror = mirror.astype(np.int64)
        if has_streams() and out.flags.c_contiguous:
            addresses = np.ascontiguousarray(self._addresses[mirror, indices])
            copy_rows(torch.from_numpy(addresses), out[:1].nbytes, out.ctypes.data)
            return
        rows = self._rows[indices]
        files = np.searchsorted(self._ends, rows, side="right")
        wanted = zip(files.tolist(), mirror.tolist(), (rows - self._starts[files]).tolist(), strict=True)
        for place, (number, mirrored, row) in enumerate(wanted):
            out[place] = self.pairs[number][mirrored][row]

    def longest_map(self) -> np.ndarray:
        """Rows [n, k, c, h, w] of the largest file, a read-only view of it."""
        return max((images for images, _ in self.pairs), key=len)

    def means(self, indices: np.ndarray) -> Tensor:
        """Scaled latents of samples `indices` [m], not mirrored, posteriors' means: float32 [m, c, h, w]."""
        indices = np.asarray(indices, dtype=np.int64)
        out = self.buffer(len(indices))
        self.read(indices, np.zeros(len(indices), dtype=np.int64), out)
        return self.scale.to_scaled(torch.from_numpy(out[:, 0].astype(np.float32)))

    def buffer(self, count: int) -> np.ndarray:
        """An uninitialised array [count, k, c, h, w] for `read` to fill."""
        return np.empty((count, *self.pairs[0][0].shape[1:]), dtype=self.dtype)


class LatentCache(LatentSource):
    """A finished cache of encode.py. Sample i is row i of all shards one after another: the order of the images."""

    def __init__(self, root: Path, encoding: Encoding, shards: list[dict[str, Any]], manifest: str) -> None:
        self.encoding, self.shards, self._manifest = encoding, shards, manifest
        files = [root / shard["file"] for shard in shards]
        mapped = [_map_shard(file, shard["count"], encoding) for file, shard in zip(files, shards, strict=True)]
        super().__init__(
            root,
            files,
            [(moments[:, 0], moments[:, 1]) for moments, _ in mapped],
            [labels for _, labels in mapped],
            encoding.classes,
            LatentScale(encoding.scale, encoding.shift),
        )

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Read the manifest and map the shards; sizes are checked, contents are not (check_shards).

        Raises UserError: no cache, an unfinished one, another format, a shard that is missing or cut short.
        """
        root = Path(expand_home(path))
        try:
            text = (root / MANIFEST).read_text()
            manifest = json.loads(text)
            encoding = Encoding.from_json(manifest["encoding"])
            shards: list[dict[str, Any]] = [
                {"file": str(s["file"]), "count": int(s["count"]), "size": int(s["size"]), "sha256": str(s["sha256"])}
                for s in manifest["shards"]
            ]
        except OSError as error:
            if problem := folder_problem(str(root)):
                raise UserError(f"data.path={root}: {problem}; encode the images first (encode.py)") from None
            if (root / ENCODING).exists():
                raise UserError(f"data.path={root}: the cache is not finished; start encode.py again") from None
            raise UserError(
                f"data.path={root}: holds no latents ({MANIFEST}: {error.strerror});"
                " encode the images first (encode.py)"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{root / MANIFEST}: not a manifest this code reads ({reason}); encode again") from None
        if not any(shard["count"] for shard in shards):
            raise UserError(f"data.path={root}: the cache holds no samples; encode the images again")
        for shard in shards:
            if not _inside(shard["file"]):
                raise UserError(f"{root / MANIFEST}: names {shard['file']!r}, which is outside of the cache")
        return cls(root, encoding, shards, hashlib.sha256(text.encode()).hexdigest())

    @property
    def space(self) -> dict[str, Any]:
        return self.encoding.space

    def described(self) -> str:
        made = self.encoding
        return f"latents of {made.resolution}-pixel images, autoencoder {made.autoencoder[:12]}"

    def fingerprint(self) -> str:
        """sha256 (hex) over the manifest, which holds every shard's hash, and the chosen rows."""
        return hashlib.sha256(self._manifest.encode() + self._rows.astype("<i8").tobytes()).hexdigest()

    def damage(self, number: int) -> str | None:
        path, pair = self.files[number], self.pairs[number]
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            return f"{path}: cannot be read ({error.strerror or error}); delete it and encode again"
        if digest != self.shards[number]["sha256"]:
            return f"{path}: does not match its hash in {MANIFEST}; delete it and encode again, it alone is made anew"
        bad = not_finite(pair)
        if not bad:
            return None
        made = self.encoding
        other = "dtype=float32" if made.dtype == "float16" else "precision=fp32" if made.precision != "fp32" else None
        return f"{path}: {bad} of {len(pair[0])} latents hold values that are not finite; encode again" + (
            f" into another folder, with latents.{other}" if other else " without these images"
        )


def _inside(file: str) -> bool:
    """Whether a name in a manifest stays in the cache's folder: shards/NAME."""
    parts = Path(file).parts
    return len(parts) == 2 and parts[0] == SHARDS and parts[1] != ".."


def map_tensors(path: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Map tensors of a safetensors file: read-only views.

    Raises:
        OSError, ValueError, KeyError, TypeError, IndexError: it cannot be read, is cut short or no such file, lacks one
        of the tensors, or has one of another kind than float16, float32 and int64.
    """
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        size = os.fstat(file.fileno()).st_size
        header = json.loads(file.read(min(header_size, size)))
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    found = {}
    for name in names:
        if name not in header:
            raise KeyError(f"there is no {name}")
        kind, shape = header[name]["dtype"], [int(length) for length in header[name]["shape"]]
        if kind not in _TENSOR_DTYPES:
            raise ValueError(f"{name} is {kind} {shape}, which is not one of {', '.join(_TENSOR_DTYPES)}")
        first, end = (8 + header_size + int(offset) for offset in header[name]["data_offsets"])
        if end > size:
            raise ValueError("it is cut short")
        array = np.frombuffer(mapped, _TENSOR_DTYPES[kind], math.prod(shape), first)
        if array.nbytes != end - first:
            raise ValueError(f"{name} has {end - first} bytes, not those of {described(array.reshape(shape))}")
        found[name] = array.reshape(shape)
    return found


def described(array: np.ndarray) -> str:
    """Kind and shape, for a message."""
    return f"{array.dtype} {list(array.shape)}"


def _map_shard(path: Path, count: int, encoding: Encoding) -> tuple[np.ndarray, np.ndarray]:
    """Map a shard: moments [n, 2, 2, c, h, w], a read-only view, and labels int64 [n], a copy.

    Raises UserError if it does not match the manifest.
    """
    wanted = {
        "moments": (np.dtype(encoding.dtype), (count, 2, 2, *encoding.latent_shape)),
        "labels": (np.dtype(np.int64), (count,)),
    }
    try:
        found = map_tensors(path, wanted)
        for name, (dtype, shape) in wanted.items():
            if found[name].dtype != dtype or found[name].shape != shape:
                raise ValueError(f"{name} is {described(found[name])}, not {dtype} {list(shape)}")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); encode the images again") from None
    except (ValueError, KeyError, TypeError, IndexError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: not the shard of its manifest ({reason}); encode the images again") from None
    moments, labels = found["moments"], found["labels"].copy()
    if count and not 0 <= int(labels.min()) <= int(labels.max()) < len(encoding.classes):
        raise UserError(f"{path}: holds labels outside of the manifest's {len(encoding.classes)} classes; encode again")
    return moments, labels


def finite_rows(moments: np.ndarray) -> np.ndarray:
    """Which of float [n, ...] hold finite values only: bool [n]."""
    return np.isfinite(moments).reshape(len(moments), -1).all(axis=1)


def not_finite(pair: tuple[np.ndarray, np.ndarray]) -> int:
    """How many samples of a file hold values that are not finite, in one orientation or the other."""
    count = 0
    for first in range(0, len(pair[0]), _AT_ONCE):
        images, mirrored = (finite_rows(rows[first : first + _AT_ONCE]) for rows in pair)
        count += int((~(images & mirrored)).sum())
    return count


def check_shards(source: LatentSource, *, threads: int, progress: Progress | None = None) -> list[str]:
    """Read all files: one line for each that is damaged or whose values are not finite. [] is remembered."""
    state = _states(source)
    problems = []
    with ThreadPoolExecutor(threads) as pool:
        for done, problem in enumerate(pool.map(source.damage, range(len(source.files))), start=1):
            if problem:
                problems.append(problem)
            if progress is not None:
                progress(done, len(source.files))
    if not problems:
        remember(_note(source), json.dumps([_CHECKS, state]).encode())
    return problems


def checked_shards(source: LatentSource, *, threads: int, progress: Progress | None = None) -> list[str]:
    """check_shards, but read nothing if the same unchanged files passed before."""
    try:
        if json.loads(_note(source).read_bytes()) == [_CHECKS, _states(source)]:
            return []
    except (OSError, ValueError):
        pass  # never checked, or the note is damaged
    return check_shards(source, threads=threads, progress=progress)


def _note(source: LatentSource) -> Path:
    """The file that remembers a check without findings."""
    identity = f"{source.fingerprint()} {source.root.absolute()}"
    return default_cache() / "checked" / f"latents-{hashlib.sha256(identity.encode()).hexdigest()[:32]}.json"


def _states(source: LatentSource) -> list[list[int]]:
    """Size and time of change of each file."""
    stats = [file.stat() for file in source.files]
    return [[stat.st_size, stat.st_mtime_ns] for stat in stats]
