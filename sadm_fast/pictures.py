"""Picture files: grids of images, folders of single images, ADM's archives."""

import math
import shutil
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sadm_fast.errors import UserError
from sadm_fast.files import LOCK, replacing, require_writable
from sadm_fast.scales import float_to_pixels

_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}  # by the ending of a file's name
_SIDE_AT_MOST = 65_500  # pixels of a grid: JPEG allows no more, and few programs open more
_RECORD = "provenance.json"
_GRID_GAP = 2
_GRID_GREY = 230
_GRID_SCALE_TO = 56  # small images are enlarged to about this many pixels


def _enlarged(shape: tuple[int, int, int]) -> int:
    """How many pixels a side a pixel of an image [C, H, W] gets in a grid."""
    return max(1, round(_GRID_SCALE_TO / shape[2]))


class Grid:
    """A picture of images in rows and columns with light gaps, filled in any order.

    Args:
        images: the number of images.
        columns: the number of columns.
        shape: (channels, height, width) of an image; small images are enlarged.
    """

    def __init__(self, images: int, columns: int, shape: tuple[int, int, int]) -> None:
        self._columns, self._factor = columns, _enlarged(shape)
        self._cell = tuple(side * self._factor + _GRID_GAP for side in shape[1:])
        self.picture = torch.full((shape[0], *self.sides(images, columns, shape)), _GRID_GREY, dtype=torch.uint8)

    @staticmethod
    def sides(images: int, columns: int, shape: tuple[int, int, int]) -> tuple[int, int]:
        """Height and width of the picture, in pixels."""
        height, width = (side * _enlarged(shape) + _GRID_GAP for side in shape[1:])
        return -(-images // columns) * height + _GRID_GAP, columns * width + _GRID_GAP

    def paste(self, first: int, images: Tensor) -> None:
        """Put images [N, C, H, W] in [-1, 1] at the places `first`, `first` + 1, ..., row by row."""
        self.paste_pixels(first, float_to_pixels(images).cpu())

    def paste_pixels(self, first: int, pixels: Tensor) -> None:
        """Put images uint8 [N, C, H, W] at the places `first`, `first` + 1, ..., row by row."""
        pixels = pixels.repeat_interleave(self._factor, 2).repeat_interleave(self._factor, 3)
        for place, image in enumerate(pixels, first):
            top, left = (_GRID_GAP + n * side for n, side in zip(divmod(place, self._columns), self._cell, strict=True))
            self.picture[:, top : top + image.shape[1], left : left + image.shape[2]] = image


def picture_grid(images: Tensor, columns: int) -> Tensor:
    """Images [N, C, H, W] in [-1, 1], row by row, as one picture uint8 [C, H', W'] with light gaps."""
    channels, height, width = images.shape[1:]
    grid = Grid(len(images), columns, (channels, height, width))
    grid.paste(0, images)
    return grid.picture


def save_picture(picture: Tensor, path: Path) -> None:
    """Write uint8 [1 or 3, H, W] as PNG, or as JPEG if the name says so; replaces an existing file as a whole."""
    array = picture.permute(1, 2, 0).numpy()
    image = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
    with replacing(path) as temporary:
        image.save(temporary, format=_FORMATS.get(path.suffix.lower(), "PNG"), quality=95)


class Output(ABC):
    """Where samples number 0 .. count-1 go, in any order and from several ranks at once.

    Every file is written as a whole, so a killed drawing leaves whole samples behind: `found` names them.

    Attributes:
        path: what is made.
        option: its name on the command line.
        begun: where the record of how the samples are drawn lies while there are not all of them.
    """

    path: Path
    option: str
    begun: Path

    @abstractmethod
    def prepare(self) -> Path:
        """Make the folder that samples are written to and return it; on one rank, before the others add.

        UserError if that fails.
        """

    @abstractmethod
    def in_use(self) -> bool:
        """Whether the prepared folder holds something: samples to go on with, or what is to be left alone."""

    @abstractmethod
    def found(self) -> list[int]:
        """The numbers of the samples that are there, whole; rising. UserError if there are others."""

    @abstractmethod
    def add(self, first: int, images: Tensor, labels: Sequence[int]) -> None:
        """Write samples number `first`, `first` + 1, ...: images [B, C, H, W] in [-1, 1]; UserError if that fails."""

    @abstractmethod
    def finish(self) -> None:
        """Make `path` of the samples, all of which are there; on one rank. UserError if that fails."""


class _FileOfSamples(Output):
    """One file of all samples: until they are there, uint8 [n, H, W, C] each in FILE.parts/FIRST.npy."""

    option = "--out"

    def __init__(self, path: Path, count: int, shape: tuple[int, int, int]) -> None:
        self.path, self._count, self._shape = path, count, shape
        self.parts = path.with_name(f"{path.name}.parts")
        self.begun = self.parts / _RECORD

    def prepare(self) -> Path:
        require_writable(self.path, self.option, make_folder=True)
        with _explained(self.parts):
            self.parts.mkdir(exist_ok=True)
            needed = 2 * self._count * math.prod(self._shape)  # the parts, and the file
            free = shutil.disk_usage(self.parts).free + sum(part.stat().st_size for part in self.parts.iterdir())
        if needed > free:
            raise UserError(
                f"{self.option} {self.path}: needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; free some, or"
                " choose another disk"
            )
        return self.parts

    def in_use(self) -> bool:
        return any(True for _ in self._parts())

    def found(self) -> list[int]:
        return [number for first, pixels in self._parts() for number in range(first, first + len(pixels))]

    def _parts(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the number of each whole part's first sample, and the part, mapped from its file; rising."""
        for path in sorted(self.parts.glob("*.npy")):
            try:
                pixels = np.load(path, mmap_mode="r")
            except (OSError, ValueError, EOFError):  # not whole
                continue
            yield int(path.stem), pixels

    def add(self, first: int, images: Tensor, labels: Sequence[int]) -> None:
        pixels = float_to_pixels(images).permute(0, 2, 3, 1).contiguous().cpu().numpy()
        part = self.parts / f"{first:09d}.npy"
        with _explained(part), replacing(part) as temporary, temporary.open("wb") as file:
            np.save(file, pixels)

    def finish(self) -> None:
        with _explained(self.path):
            self._write(self._parts())
            shutil.rmtree(self.parts)

    @abstractmethod
    def _write(self, parts: Iterator[tuple[int, np.ndarray]]) -> None:
        """Write the file. The parts are in order, and each sample is in one."""


class GridFile(_FileOfSamples):
    """A grid of samples, row by row.

    Raises:
        UserError: the picture would be too large.
    """

    def __init__(self, path: Path, count: int, columns: int, shape: tuple[int, int, int]) -> None:
        height, width = Grid.sides(count, columns, shape)
        if max(height, width) > _SIDE_AT_MOST:
            raise UserError(
                f"--count {count}: a grid of {width} x {height} pixels is too large; --folder writes single pictures"
            )
        super().__init__(path, count, shape)
        self._columns = columns

    def _write(self, parts: Iterator[tuple[int, np.ndarray]]) -> None:
        grid = Grid(self._count, self._columns, self._shape)
        for first, pixels in parts:
            grid.paste_pixels(first, torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2))
        save_picture(grid.picture, self.path)


class NpzFile(_FileOfSamples):
    """All samples as `arr_0`, uint8 [count, H, W, C]: what the evaluator of ADM (guided-diffusion) reads.

    It is written part by part: not all samples are ever in memory.
    """

    def _write(self, parts: Iterator[tuple[int, np.ndarray]]) -> None:
        channels, height, width = self._shape
        header = {"descr": "|u1", "fortran_order": False, "shape": (self._count, height, width, channels)}
        with (
            replacing(self.path) as temporary,
            zipfile.ZipFile(temporary, "w") as archive,
            archive.open("arr_0.npy", "w", force_zip64=True) as file,
        ):
            np.lib.format.write_array_header_1_0(file, header)
            for _, pixels in parts:
                file.write(pixels.tobytes())


class ClassFolders(Output):
    """A PNG a sample in a folder of its class: PATH/class/number.png.

    Args:
        path: a folder that is new or empty, or was begun.
        classes: the name of each label.
    """

    option = "--folder"

    def __init__(self, path: Path, classes: Sequence[str], count: int) -> None:
        self.path, self._count = path, count
        self._folders = [path / _folder_name(i, name) for i, name in enumerate(classes)]
        self.begun = beside(path)

    def prepare(self) -> Path:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--folder {self.path}: cannot be used ({error.strerror})") from None
        return self.path

    def in_use(self) -> bool:
        return any(entry.name != LOCK for entry in self.path.iterdir())

    def found(self) -> list[int]:
        numbers = {int(file.stem): file for file in self.path.glob("*/*.png") if file.stem.isdecimal()}
        if numbers and (last := max(numbers)) >= self._count:
            raise UserError(f"--folder {self.path}: {numbers[last]} is none of {self._count} samples; remove it")
        return sorted(number for number, file in numbers.items() if _is_whole(file))

    def add(self, first: int, images: Tensor, labels: Sequence[int]) -> None:
        for number, (pixels, label) in enumerate(zip(float_to_pixels(images).cpu(), labels, strict=True), first):
            folder = self._folders[label]
            with _explained(folder):
                folder.mkdir(exist_ok=True)
                save_picture(pixels, folder / f"{number:06d}.png")

    def finish(self) -> None:
        """Nothing is left to do."""


def beside(path: Path) -> Path:
    """The file beside samples that says how they were drawn."""
    return path.with_name(f"{path.name}.{_RECORD}")


def _is_whole(picture: Path) -> bool:
    """Whether a PNG can be read to its end."""
    try:
        with Image.open(picture) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError):
        return False
    return True


def _folder_name(number: int, name: str) -> str:
    """The name of a class as a folder's: itself, or `class-NUMBER` where it would lead elsewhere."""
    return f"class-{number}" if name in ("", ".", "..") or "/" in name or "\0" in name else name


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Make an OSError inside a UserError about `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
