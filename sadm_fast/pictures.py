"""Picture files: grids of images, and folders of single images."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from sadm_fast.errors import UserError
from sadm_fast.files import replacing, require_writable
from sadm_fast.scales import float_to_pixels

_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}  # by the ending of a file's name
_SIDE_AT_MOST = 65_500  # pixels of a grid: JPEG allows no more, and few programs open more
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
        pixels = float_to_pixels(images).cpu()
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


class GridFile:
    """A grid of samples, written when all are drawn.

    Raises:
        UserError: the file's name has no known ending, it cannot be written, or the picture would be too large.
    """

    def __init__(self, path: Path, count: int, columns: int, shape: tuple[int, int, int]) -> None:
        if path.suffix.lower() not in _FORMATS:
            raise UserError(f"--out {path}: must end in {', '.join(_FORMATS)}")
        height, width = Grid.sides(count, columns, shape)
        if max(height, width) > _SIDE_AT_MOST:
            raise UserError(
                f"--count {count}: a grid of {width} x {height} pixels is too large; --folder writes single pictures"
            )
        require_writable(path, "--out", make_folder=True)
        self.path = path
        self._grid = Grid(count, columns, shape)

    def add(self, first: int, images: Tensor) -> None:
        """Take samples number `first`, `first` + 1, ...: images [B, C, H, W] in [-1, 1]."""
        self._grid.paste(first, images)

    def finish(self) -> None:
        """Write the file; UserError if that fails."""
        _save_or_explain(self._grid.picture, self.path)


class ClassFolders:
    """A PNG a sample in a folder of its class, written as it is drawn.

    Args:
        path: a folder that is new or empty.
        classes: sample i is of class i modulo their number.

    Raises:
        UserError: the folder holds something, or cannot be written.
    """

    def __init__(self, path: Path, classes: list[str]) -> None:
        self.path = path
        self._folders = [path / _folder_name(i, name) for i, name in enumerate(classes)]
        try:
            path.mkdir(parents=True, exist_ok=True)
            if any(path.iterdir()):
                raise UserError(f"--folder {path}: is not empty; choose another, or remove what is in it")
            for folder in self._folders:
                folder.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"--folder {path}: cannot be used ({error.strerror})") from None

    def add(self, first: int, images: Tensor) -> None:
        """Write samples number `first`, `first` + 1, ...: images [B, C, H, W] in [-1, 1]."""
        for number, pixels in enumerate(float_to_pixels(images).cpu(), first):
            _save_or_explain(pixels, self._folders[number % len(self._folders)] / f"{number:06d}.png")

    def finish(self) -> None:
        """Nothing is left to write."""


def _folder_name(number: int, name: str) -> str:
    """The name of a class as a folder's: itself, or `class-NUMBER` where it would lead elsewhere."""
    return f"class-{number}" if name in ("", ".", "..") or "/" in name or "\0" in name else name


def _save_or_explain(picture: Tensor, path: Path) -> None:
    try:
        save_picture(picture, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
