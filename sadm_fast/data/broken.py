"""Broken images in training: each is replaced by the next readable one, and counted.

Image i is replaced by the first readable one of i + 1, i + 2, ... (mod N), with that one's label. So a batch is a
function of the counters and the files alone, on any rank, in any worker, with either loader. In a listing by class the
next image nearly always has the same class.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import Image

from sadm_fast.data.adm_crop import read_crop
from sadm_fast.data.batch import LoaderSpec
from sadm_fast.data.checking import examine, read_problem, refused_kind, too_small
from sadm_fast.data.source import ImageSource
from sadm_fast.errors import UserError

_NEIGHBOURS = 100  # so many unreadable images in a row are no accident
_LIMIT, _LIMIT_SHARE = 100, 0.01  # a run ends after more broken images than both


@dataclass(frozen=True)
class Crop:
    """The crop of an image, or of the one that replaces it."""

    pixels: np.ndarray  # uint8 [resolution, resolution, channels]
    index: int  # the image that was read
    broken: dict[int, str]  # those before it that could not be: index -> reason


def read_or_replace(source: ImageSource, index: int, spec: LoaderSpec) -> Crop:
    """The ADM crop of image `index`, or of the next readable one; UserError if 100 in a row, or all, are broken."""
    broken: dict[int, str] = {}
    for neighbour in range(index, index + min(_NEIGHBOURS, len(source))):
        candidate = neighbour % len(source)
        crop = read_crop_or_reason(source, candidate, spec)
        if not isinstance(crop, str):
            return Crop(crop, candidate, broken)
        broken[candidate] = crop
    raise UserError(
        f"{source.name(index)}: {broken[index]} (and so for the next {len(broken) - 1} images: {_damaged(source)})"
    )


def read_all_or_replace(
    source: ImageSource, indices: Iterable[int], spec: LoaderSpec, pool: ThreadPoolExecutor
) -> list[Crop]:
    """read_or_replace for each index, in the threads of `pool`."""
    return list(pool.map(lambda index: read_or_replace(source, int(index), spec), indices))


def read_crop_or_reason(source: ImageSource, index: int, spec: LoaderSpec) -> np.ndarray | str:
    """The ADM crop of image `index`, uint8 [S, S, C], or the reason why it is broken."""
    try:
        encoded = source.read(index)
    except OSError as error:
        return read_problem(error)
    try:
        with Image.open(BytesIO(encoded)) as image:
            width, height = image.size
            refused = refused_kind(image)
        if refused is not None:
            return refused
        if min(width, height) < spec.resolution and not spec.enlarge:
            return too_small(width, height, spec.resolution)
        return read_crop(BytesIO(encoded), spec.resolution, spec.channels, spec.enlarge)
    except Exception as error:  # as in examine: Pillow's parsers raise nearly anything for damaged files
        return examine(encoded).reason or f"cannot be read ({type(error).__name__}: {error})"


class BrokenImages:
    """The images of a source that were found broken so far, and what replaces them."""

    def __init__(self, source: ImageSource) -> None:
        self.reasons: dict[str, str] = {}  # name -> reason, in the order met
        self._source = source
        self._indices: set[int] = set()

    def add(self, broken: dict[int, str]) -> bool:
        """Remember indices and reasons; return whether any is new. UserError when there are too many to go on."""
        known = len(self._indices)
        for index, reason in broken.items():
            if index not in self._indices:
                self._indices.add(index)
                self.reasons[self._source.name(index)] = reason
        if len(self._indices) > max(_LIMIT, int(_LIMIT_SHARE * len(self._source))):
            name, reason = next(iter(self.reasons.items()))
            raise UserError(
                f"{name}: {reason} (and {len(self._indices) - 1} more of {len(self._source)} images: "
                f"{_damaged(self._source)})"
            )
        return len(self._indices) > known

    def replace(self, indices: np.ndarray) -> np.ndarray:
        """The images to read for `indices` (int64): their own, or the next ones not known to be broken."""
        if not self._indices.intersection(indices.tolist()):
            return indices
        return np.array([self._stand_in(index) for index in indices.tolist()], dtype=np.int64)

    def _stand_in(self, index: int) -> int:
        candidates = ((index + step) % len(self._source) for step in range(len(self._source)))
        # If all of them were broken at some time, this one is tried again.
        return next((candidate for candidate in candidates if candidate not in self._indices), index)


def _damaged(source: ImageSource) -> str:
    return (
        f"the data of data.path={source.where} seem to be damaged or gone; "
        f"list the broken images with python sadm_fast/encode.py --check {source.where}"
    )
