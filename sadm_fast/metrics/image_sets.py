"""Sets of images that are scored, or scored against: folders, ADM's .npz, cached latents, and moments without images.

An .npz of samples has `arr_0`, uint8 [N, H, W, 1 or 3]. A reference .npz has that, or `mu` [2048] and `sigma` [2048,
2048] of Inception's pooled features (FID), `mu_s` and `sigma_s` of its 2,023 spatial ones (sFID), or both: then
distances are to the moments, all else is to the images. So are those of ADM and, without sFID, of pytorch-fid and EDM.
"""

import os
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import file_digest
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sadm_fast import data
from sadm_fast.data.batch import LoaderSpec, stack_crops
from sadm_fast.data.broken import read_crop_or_reason
from sadm_fast.data.checking import Progress, checked, examine, read_problem
from sadm_fast.data.image_folder import EXTENSIONS, ImageFolder
from sadm_fast.data.latents import LatentSource
from sadm_fast.data.lightning_latents import LightningLatents
from sadm_fast.data.paths import folder_problem
from sadm_fast.data.source import ImageSource, PackedNames, Source
from sadm_fast.errors import UserError
from sadm_fast.feed import asked_as
from sadm_fast.files import parse_json
from sadm_fast.generation import to_images
from sadm_fast.metrics.evaluator import Moments
from sadm_fast.metrics.pretrained import FID, SFID, InceptionJudge
from sadm_fast.models.autoencoder import Autoencoder
from sadm_fast.pictures import beside
from sadm_fast.ranks.collectives import broadcast_json, only_on_rank_zero
from sadm_fast.scales import pixels_to_float

_THREADS = min(8, os.cpu_count() or 1)
_MOMENTS = {FID: ("mu", "sigma"), SFID: ("mu_s", "sigma_s")}
_IMAGES = "arr_0"
_GREY = ("1", "L", "LA")  # pixel modes of Pillow
_LAYOUT = f"{_IMAGES}, uint8 [N, H, W, 1 or 3]"


class ImageSet(ABC):
    """Images of one size, in order.

    Attributes:
        where: their path.
        shape: (channels, height, width); (0, 0, 0) of moments without images.
        moments: of all images of a larger set that these are some of, by metric.
    """

    where: str
    shape: tuple[int, int, int]
    moments: dict[str, Moments]

    @abstractmethod
    def __len__(self) -> int:
        """The number of images."""

    @abstractmethod
    def batches(self, first: int, step: int, size: int) -> Iterator[Tensor]:
        """Images number first, first + step, ..., `size` at a time: float32 [B, C, H, W] in [-1, 1].

        UserError for one that cannot be read.
        """

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Which images these are, for the record of a score."""


class FolderImages(ImageSet):
    """Encoded images, each centre-cropped to `shape` as ADM does it: as it is if it has that size.

    Args:
        source: of images that are large enough.
        provenance: the record of how they were drawn, if there is one.
    """

    def __init__(
        self, source: ImageSource, shape: tuple[int, int, int], provenance: dict[str, Any] | None = None
    ) -> None:
        self.where, self.shape, self.moments = source.where, shape, {}
        self._source, self._provenance = source, provenance
        self._spec = LoaderSpec(shape[1], shape[0], threads=_THREADS)

    def __len__(self) -> int:
        return len(self._source)

    def batches(self, first: int, step: int, size: int) -> Iterator[Tensor]:
        with ThreadPoolExecutor(_THREADS) as pool:
            for numbers in _split(range(first, len(self), step), size):
                crops = list(pool.map(lambda i: read_crop_or_reason(self._source, i, self._spec), numbers))
                for number, crop in zip(numbers, crops, strict=True):
                    if isinstance(crop, str):
                        raise UserError(f"{self._source.name(number)}: {crop}")
                yield pixels_to_float(stack_crops([crop for crop in crops if not isinstance(crop, str)]))

    def require_sound(self, option: str, progress: Progress | None) -> None:
        """UserError if an image is broken or too small, looked at once and remembered (data.checking)."""
        report = checked(self._source, threads=_THREADS, progress=progress)
        if report.problems:
            (name, reason), more = report.problems[0], len(report.problems) - 1
            raise UserError(f"{name}: {reason} (and {more} more of {report.images} images of {option} {self.where})")
        if report.smallest_side < min(self.shape[1:]):
            raise UserError(
                f"{report.smallest_name}: its shorter side has {report.smallest_side} pixels, the samples of"
                f" {self.shape[2]}x{self.shape[1]} more; compare with images at least as large"
            )

    def facts(self) -> dict[str, Any]:
        made = {} if self._provenance is None else {"provenance": self._provenance}
        return {"of": self.where, "images": len(self), "fingerprint": self._source.fingerprint(), **made}


class NpzImages(ImageSet):
    """The images and moments of an .npz. It is read from its beginning to its end, never as a whole.

    Args:
        option: what gave the path, for messages.
        samples: images that were drawn: there must be some, moments are of no use, and the record beside is read.

    Raises:
        UserError: there is no such file, it is no .npz, of another layout, cut off, or not finished.
    """

    def __init__(self, path: Path, option: str, *, samples: bool) -> None:
        self.where, self._path = str(path), path
        self._name, self._samples = f"{option} {path}".strip(), samples
        self.shape, self._count, self.moments = (0, 0, 0), 0, {}
        if samples and not path.exists() and path.with_name(f"{path.name}.parts").is_dir():
            raise UserError(f"{path}: is not finished; the sample.py command that began it continues it")
        try:
            with zipfile.ZipFile(path) as archive:
                names = [name.removesuffix(".npy") for name in archive.namelist()]
                if _IMAGES in names:
                    self._count, self.shape = self._header(archive)
                if not samples:
                    self.moments = {
                        metric: self._read_moments(archive, metric) for metric, of in _MOMENTS.items() if of[0] in names
                    }
        except OSError as error:
            raise UserError(f"{self._name}: cannot be read ({error.strerror or error})") from None
        except (zipfile.BadZipFile, ValueError, KeyError, EOFError) as error:
            raise self._misfit(str(error)) from None
        if not self._count and not self.moments:
            raise self._misfit(f"it has {', '.join(names[:5]) or 'nothing'}")
        self._provenance = _provenance(path, self._count) if samples else None

    def _misfit(self, why: str) -> UserError:
        or_moments = "" if self._samples else ", or mu and sigma"
        return UserError(f"{self._name}: is no .npz of images ({why}); expected {_LAYOUT}{or_moments}")

    def __len__(self) -> int:
        return self._count

    def _header(self, archive: zipfile.ZipFile) -> tuple[int, tuple[int, int, int]]:
        """Number and [C, H, W] of the images; ValueError for another layout."""
        with archive.open(f"{_IMAGES}.npy") as file:
            shape, fortran, dtype = _npy_header(file)
            rest = archive.getinfo(f"{_IMAGES}.npy").file_size - file.tell()
        if fortran or dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or min(shape) < 1:
            raise ValueError(f"its {_IMAGES} is {dtype} {list(shape)}")
        if rest != int(np.prod(shape, dtype=object)):
            raise ValueError(f"its {_IMAGES} is cut off")
        count, height, width, channels = shape
        return count, (channels, height, width)

    def _read_moments(self, archive: zipfile.ZipFile, metric: str) -> Moments:
        """Mean and covariance; ValueError for others than Inception's, or where they are not finite."""
        dimension = InceptionJudge.feature_dim if metric == FID else InceptionJudge.more_spaces[metric]
        found = []
        for name, wanted in zip(_MOMENTS[metric], ((dimension,), (dimension, dimension)), strict=True):
            with archive.open(f"{name}.npy") as file:
                value = np.lib.format.read_array(file, allow_pickle=False)
            if value.shape != wanted or value.dtype.kind != "f":
                raise ValueError(f"its {name} is {value.dtype} {list(value.shape)}, not {list(wanted)}")
            if not np.isfinite(value).all():
                raise ValueError(f"its {name} holds values that are not finite")
            found.append(torch.from_numpy(value.astype(np.float64)))
        return found[0], found[1]

    def batches(self, first: int, step: int, size: int) -> Iterator[Tensor]:
        if not self._count:
            return
        channels, height, width = self.shape
        block, one = size * step, height * width * channels  # the images that come to be a batch, bytes of one
        try:
            with zipfile.ZipFile(self._path) as archive, archive.open(f"{_IMAGES}.npy") as file:
                _npy_header(file)
                for start in range(0, self._count, block):
                    content = file.read(min(block, self._count - start) * one)
                    pixels = np.frombuffer(content, np.uint8).reshape(-1, height, width, channels)[first::step]
                    if len(pixels):
                        yield pixels_to_float(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()))
        except (OSError, zipfile.BadZipFile, ValueError, EOFError) as error:
            raise UserError(f"{self._name}: cannot be read ({error})") from None

    def facts(self) -> dict[str, Any]:
        with self._path.open("rb") as file:
            digest = file_digest(file, "sha256").hexdigest()
        made = {} if self._provenance is None else {"provenance": self._provenance}
        moments = [name for metric in self.moments for name in _MOMENTS[metric]]
        return {"of": self.where, "images": self._count, "moments": moments, "sha256": digest, **made}


class LatentImages(ImageSet):
    """Cached latents, decoded at their posterior's mean."""

    def __init__(self, source: LatentSource, autoencoder: Autoencoder, device: torch.device) -> None:
        self.where, self.moments = source.where, {}
        side = source.latent_shape[1] * autoencoder.downsample
        self.shape = (autoencoder.image_channels, side, side)
        self._source, self._autoencoder, self._device = source, autoencoder, device

    def __len__(self) -> int:
        return len(self._source)

    def batches(self, first: int, step: int, size: int) -> Iterator[Tensor]:
        for numbers in _split(range(first, len(self), step), size):
            yield to_images(self._source.means(np.array(numbers)).to(self._device), self._autoencoder)

    def facts(self) -> dict[str, Any]:
        return {
            "of": self.where,
            "images": len(self),
            "fingerprint": self._source.fingerprint(),
        } | self._source.space


def _split(numbers: range, size: int) -> Iterator[range]:
    return (numbers[start : start + size] for start in range(0, len(numbers), size))


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(file)
    if version not in read:
        raise ValueError(f"of .npy version {version[0]}.{version[1]}")
    return read[version](file)


def _provenance(path: Path, images: int) -> dict[str, Any] | None:
    """The record that sample.py leaves beside samples; None if there is none. UserError if there are not all."""
    record = beside(Path(os.path.abspath(path)))
    try:
        value = parse_json(record.read_bytes())
        wanted, complete = int(value["images"]), value["complete"] is True
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{record}: is no record of samples ({error}); bring it back, or remove it") from None
    if images != wanted or not complete:
        raise UserError(
            f"{path}: holds {images} of {wanted} samples{'' if complete else ', and is not marked as complete'};"
            " the sample.py command that drew them continues it"
        )
    return value


def list_images(path: Path, option: str) -> ImageFolder:
    """The images below a folder, at any depth, in the order of their paths; a class is a folder that holds some.

    Hidden files, and files that are no images by their names, are left out. UserError if there are no others.
    """
    name = f"{option} {path}".strip()
    if problem := folder_problem(str(path)):
        raise UserError(f"{name}: {problem}")

    def refuse(error: OSError) -> None:
        raise UserError(f"{name}: {error.filename} cannot be listed ({error.strerror})")

    found, seen = [], set()
    for folder, below, files in os.walk(path, onerror=refuse, followlinks=True):
        identity = os.stat(folder)
        if (key := (identity.st_dev, identity.st_ino)) in seen:  # links in a circle
            below.clear()
            continue
        seen.add(key)
        below[:] = [entry for entry in below if not entry.startswith(".")]
        inside = os.path.relpath(folder, path)
        found += [
            (inside, entry) for entry in files if not entry.startswith(".") and entry.lower().endswith(EXTENSIONS)
        ]
    if not found:
        raise UserError(f"{name}: has no images ({' '.join(EXTENSIONS)})")
    found.sort()
    classes = sorted({folder for folder, _ in found})
    number = {folder: label for label, folder in enumerate(classes)}
    names = PackedNames.from_iterable(os.path.normpath(os.path.join(*of)) for of in found)
    return ImageFolder(path, names, np.array([number[folder] for folder, _ in found]), tuple(classes))


def open_samples(path: Path, progress: Progress | None = None) -> ImageSet:
    """Images that were drawn: a folder of them, or an .npz. Collective: rank 0 decodes every image of a folder.

    Raises:
        UserError: there is none, or not all that were to be drawn (the record that sample.py leaves); of a folder, one
            is broken or of another size than the others, or they are not square.
    """
    if path.suffix.lower() == ".npz":
        return NpzImages(path, "", samples=True)
    source = list_images(path, "")
    provenance = _provenance(path, len(source))
    shape: list[int] = []
    only_on_rank_zero(lambda: shape.extend(_common_shape(source, progress)))
    channels, height, width = broadcast_json(shape)
    return FolderImages(source, (channels, height, width), provenance)


def _common_shape(source: ImageSource, progress: Progress | None) -> tuple[int, int, int]:
    """[C, H, W] of images, grey if all are; decodes every one. UserError as `open_samples`."""

    def look(number: int) -> tuple[int, int, bool]:
        try:
            encoded = source.read(number)
        except OSError as error:
            raise UserError(f"{source.name(number)}: {read_problem(error)}") from None
        width, height, reason = examine(encoded)
        if reason is not None:
            raise UserError(f"{source.name(number)}: {reason}")
        with Image.open(BytesIO(encoded)) as image:
            return width, height, image.mode in _GREY

    grey, first = True, (0, 0)
    with ThreadPoolExecutor(_THREADS) as pool:
        for number, (width, height, is_grey) in enumerate(pool.map(look, range(len(source)))):
            first, grey = first if number else (width, height), grey and is_grey
            if (width, height) != first:
                raise UserError(
                    f"{source.name(number)}: is {width}x{height} pixels, {source.name(0)} {first[0]}x{first[1]};"
                    " samples must be of one size"
                )
            if progress is not None:
                progress(number + 1, len(source))
    if first[0] != first[1]:
        raise UserError(f"{source.name(0)}: is {first[0]}x{first[1]} pixels; samples must be square")
    return 1 if grey else 3, first[1], first[0]


def open_reference(
    path: Path,
    shape: tuple[int, int, int],
    autoencoder: Autoencoder | None,
    device: torch.device,
    *,
    at_most: int | None = None,
    progress: Progress | None = None,
) -> ImageSet:
    """What samples of `shape` [C, H, W] are compared with: a reference .npz, cached latents, or images in a folder, in
    tar shards, or of the demo. Larger images are cropped as in training. Collective: rank 0 looks for broken ones.

    at_most: so many of them, evenly chosen; of an .npz always all.

    Raises:
        UserError: in the name of --data; there is none, one is broken or smaller than `shape`, or of an .npz or cached
            latents another size; latents without their autoencoder.
    """
    option = "--data"
    if path.suffix.lower() == ".npz":
        found: ImageSet = NpzImages(path, option, samples=False)
    elif path.is_dir() and data.kind_of(path) == "folder":
        folder = list_images(path, option)
        found = FolderImages(folder.subset(np.asarray(evenly(folder, at_most))), shape)
    else:
        with asked_as(option):
            source = data.open_any(str(path))
        if isinstance(source, LatentSource):
            if autoencoder is None:
                raise UserError(f"{option} {path}: holds latents; give their --autoencoder")
            if isinstance(source, LightningLatents):
                source = source.with_scale(autoencoder.scale)
            else:
                autoencoder.require_space(source.space, f"{option} {path}")
            found = LatentImages(source.subset(np.asarray(evenly(source, at_most))), autoencoder, device)
        else:
            found = FolderImages(source.subset(np.asarray(evenly(source, at_most))), shape)
    if isinstance(found, FolderImages):
        only_on_rank_zero(lambda: found.require_sound(option, progress))
    elif len(found) and found.shape != shape:
        here, there = (f"{of[2]}x{of[1]} pixels in {of[0]} channel(s)" for of in (found.shape, shape))
        raise UserError(f"{option} {path}: holds images of {here}, the samples have {there}")
    return found


def evenly(source: Source, at_most: int | None) -> range:
    """Numbers of at most so many samples, evenly chosen; None: of all."""
    return range(0, len(source), 1 if at_most is None else -(-len(source) // at_most))
