"""Image folders laid out like ImageNet, root/class/name.ext: listed, checked, split, fingerprinted.

The order of classes and files is the order of their names as strings, so one folder is the same list
everywhere.
"""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from sadm_fast.counters import Stream, uniform
from sadm_fast.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm")
"""What both loaders read. The contents decide how a file is decoded, so a JPEG named .png is fine."""

MAX_CHECKED = 20_000
"""ImageFolder.check opens at most this many headers (seconds); of a larger folder, an even sample."""

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM")
_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK")
_IGNORED = ("thumbs.db", "desktop.ini")  # what file managers leave behind; names with a leading dot as well
_CHECK_THREADS = 16  # more than cores: on a network file system opening is waiting


@dataclass(frozen=True, eq=False)
class ImageFolder:
    """The images of a folder: file i has class labels[i]."""

    root: Path
    files: tuple[str, ...]  # paths relative to root
    labels: np.ndarray  # int64 [len(files)], index into classes
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> str:
        """The path of an image, as the operating system takes it."""
        return os.path.join(self.root, self.files[index])

    @staticmethod
    def scan(path: str | Path) -> "ImageFolder":
        """List root/class/name.ext by name. Hidden files are ignored, anything else unexpected is an error.

        Raises UserError: missing or empty folder, no class subfolders, a class without images, a file that is
        not an image by its name, a folder inside a class, no permission.
        """
        root = Path(path).expanduser()
        if not root.is_dir():
            what = "is a file, not a folder" if root.exists() else "no such folder"
            raise UserError(f"data.path={root}: {what}; give a folder of class folders of images")
        classes: list[str] = []
        stray: list[str] = []
        for entry in _entries(root):
            (classes if entry.is_dir() else stray).append(entry.name)
        if not classes and not stray:
            raise UserError(f"data.path={root}: the folder is empty; put images in it as {root}/CLASS/NAME.png")
        if not classes:
            raise UserError(
                f"data.path={root}: has no class subfolders (found the file {min(stray)!r}); "
                f"move the images to {root}/CLASS/NAME.png"
            )
        if stray:
            raise UserError(
                f"data.path={root}: the file {min(stray)!r} lies beside the class folders; "
                "move it into a class folder or out of the data folder"
            )
        classes.sort()
        files: list[str] = []
        counts = []
        for name in classes:
            found = _images_of_class(root, name)
            files += found
            counts.append(len(found))
        labels = np.repeat(np.arange(len(classes), dtype=np.int64), counts)
        return ImageFolder(root, tuple(files), labels, tuple(classes))

    def check(self, resolution: int, max_checked: int = MAX_CHECKED) -> None:
        """Open every image's header (beyond max_checked images: an even sample that includes both ends).

        Raises UserError that names the first bad file: unreadable, not an image, a kind that the loaders do
        not take (16 bits, animated, TIFF), or with a side below `resolution` pixels. Pixel data is not
        decoded.
        """
        count = min(len(self), max_checked)
        sample = np.unique(np.linspace(0, len(self) - 1, count).round().astype(np.int64)).tolist()
        with ThreadPoolExecutor(_CHECK_THREADS) as pool:
            chunks = [sample[start : start + 256] for start in range(0, len(sample), 256)]
            problems = [
                problem
                for found in pool.map(lambda chunk: [header_problem(self.path(i), resolution) for i in chunk], chunks)
                for problem in found
                if problem
            ]
        if problems:
            more = f" (and {len(problems) - 1} more of {len(sample)} images checked)" if problems[1:] else ""
            raise UserError(problems[0] + more)

    def subset(self, indices: np.ndarray) -> "ImageFolder":
        """The images at `indices` (int64), in that order, with the same classes."""
        files = tuple(self.files[i] for i in indices.tolist())
        return ImageFolder(self.root, files, self.labels[indices], self.classes)

    def split(self, fraction: float, seed: int) -> tuple["ImageFolder", "ImageFolder"]:
        """(rest, held_out): about `fraction` of every class is held out, chosen by (seed, list position).

        A class gives round(fraction * its size) images and always keeps one. Raises ValueError unless
        0 < fraction < 1, UserError when that leaves nothing held out.
        """
        if not 0 < fraction < 1:
            raise ValueError(f"fraction={fraction}: must lie between 0 and 1")
        draw = uniform(seed, Stream.SPLIT, torch.arange(len(self)))[:, 0].numpy()
        by_class = np.lexsort((draw, self.labels))
        counts = np.bincount(self.labels, minlength=len(self.classes))
        rank_in_class = np.arange(len(self)) - np.repeat(np.cumsum(counts) - counts, counts)
        wanted = np.minimum(np.round(fraction * counts), counts - 1)
        held = np.zeros(len(self), dtype=bool)
        held[by_class] = rank_in_class < np.repeat(wanted, counts)
        if not held.any():
            raise UserError(
                f"data.path={self.root}: {len(self)} images in {len(self.classes)} classes are too few to "
                f"hold out {fraction:g} of each class; add images or hold out more"
            )
        return self.subset(np.flatnonzero(~held)), self.subset(np.flatnonzero(held))

    def fingerprint(self) -> str:
        """SHA-256 (hex) over class names, file names and labels: the same wherever the folder lies."""
        digest = hashlib.sha256()
        for names in (self.classes, self.files):
            digest.update(os.fsencode("\0".join(names)) + b"\0\0")  # no file name holds a NUL
        digest.update(self.labels.astype("<i8").tobytes())
        return digest.hexdigest()


def header_problem(path: str, resolution: int) -> str | None:
    """What is wrong with an image file by its header, as one line that names it; None if nothing is."""
    try:
        with Image.open(path) as image:
            if image.format not in _FORMATS:
                return f"{path}: is {image.format}, which the loaders do not read; convert it to PNG or JPEG"
            if image.mode not in _MODES:
                return f"{path}: has pixel mode {image.mode}, not 8 bits a channel; convert it to 8-bit PNG"
            if getattr(image, "is_animated", False):
                return f"{path}: is animated; save the frames as separate images"
            if min(image.size) < resolution:
                size = f"{image.width}x{image.height}"
                return (
                    f"{path}: {size} pixels is smaller than data.resolution={resolution}; "
                    "remove it or lower data.resolution"
                )
    except UnidentifiedImageError:
        what = "is an empty file" if os.path.getsize(path) == 0 else "is not an image"
        return f"{path}: {what}; remove it or replace it"
    except PermissionError:
        return f"{path}: no permission to read it; fix with chmod a+r"
    except (OSError, Image.DecompressionBombError) as error:
        return f"{path}: cannot be read ({error.__class__.__name__}: {error}); remove it or replace it"
    return None


def pixel_problem(path: str, resolution: int) -> str | None:
    """As header_problem, but decodes the pixels too: finds truncated and damaged files."""
    problem = header_problem(path, resolution)
    if problem:
        return problem
    try:
        with Image.open(path) as image:
            image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises all three for damaged pixel data
        return f"{path}: the image is damaged ({error}); remove it or replace it"
    return None


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """The entries of a folder that are not hidden, in the file system's order."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith(".") and entry.name.lower() not in _IGNORED:
                    yield entry
    except PermissionError:
        raise UserError(f"data.path: no permission to list {folder}; fix with chmod a+rx {folder}") from None


def _images_of_class(root: Path, name: str) -> list[str]:
    """The images of one class folder, sorted, as paths relative to root."""
    found = []
    for entry in _entries(root / name):
        if entry.is_dir():
            raise UserError(
                f"data.path={root}: class {name!r} contains the folder {entry.name!r}; "
                f"images must lie directly in {root / name}"
            )
        if not entry.name.lower().endswith(EXTENSIONS):
            raise UserError(
                f"{entry.path}: is not an image by its name; remove it or convert it (readable: {' '.join(EXTENSIONS)})"
            )
        found.append(f"{name}/{entry.name}")
    if not found:
        raise UserError(f"data.path={root}: class {name!r} has no images; add some or remove the folder {root / name}")
    return sorted(found)
