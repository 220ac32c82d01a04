"""Image folders laid out like ImageNet, root/class/name.ext.

The order of classes and files is the order of their names as strings, so one folder is the same list
everywhere.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from sadm_fast.data.paths import folder_problem, kind, open_plain_file
from sadm_fast.data.source import ImageSource, PackedNames, hash_names, printable
from sadm_fast.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm")
"""What both loaders read. The contents decide how a file is decoded, so a JPEG named .png is fine."""

_IGNORED = ("thumbs.db", "desktop.ini", "icon\r")  # what file managers leave behind; names with a leading dot as well
_THREADS = 16  # more than cores: on a network file system listing is waiting


@dataclass(frozen=True, eq=False)
class ImageFolder(ImageSource):
    """The images of a folder: file i has class labels[i]."""

    root: Path
    files: PackedNames  # paths relative to root
    labels: np.ndarray  # int64 [len(files)], index into classes
    classes: tuple[str, ...]

    @property
    def where(self) -> str:
        return printable(str(self.root))

    def path(self, index: int) -> str:
        """The path of an image, as the operating system takes it."""
        return os.path.join(self.root, self.files[index])

    def name(self, index: int) -> str:
        return printable(self.path(index))

    def read(self, index: int) -> bytes:
        with open(self.path(index), "rb", buffering=0, opener=open_plain_file) as file:
            return file.read()

    def stamp(self) -> str:
        return " ".join(str((self.root / name).stat().st_mtime_ns) for name in self.classes)

    def subset(self, indices: np.ndarray) -> "ImageFolder":
        return replace(self, files=self.files.take(indices), labels=self.labels[indices])

    def fingerprint(self) -> str:
        digest = hash_names(PackedNames.from_iterable(self.classes), self.files)
        digest.update(self.labels.astype("<i8").tobytes())
        return digest.hexdigest()

    @staticmethod
    def scan(path: str | Path) -> "ImageFolder":
        """List root/class/name.ext by name. Hidden files are ignored, anything else unexpected is an error.

        Raises UserError: missing or empty folder, no class subfolders, a class without images, a file that is
        not an image by its name, a folder inside a class, no permission.
        """
        root = Path(path)
        where = printable(str(root))
        if problem := folder_problem(str(root)):
            raise UserError(f"data.path={where}: {problem}; give a folder of class folders of images")
        classes: list[str] = []
        stray: dict[str, str] = {}  # name -> what it is
        for entry in _entries(root):
            what = kind(entry)
            if what == "folder":
                classes.append(entry.name)
            elif what is not None:
                stray[entry.name] = what
        if not classes and not stray:
            raise UserError(f"data.path={where}: the folder is empty; put images in it as {where}/CLASS/NAME.png")
        for name, what in sorted(stray.items()):
            if what.startswith("link"):  # to a class folder on a disk that is not there, perhaps
                raise UserError(f"data.path={where}: {name!r} is a {what}; remove it, or bring back what it leads to")
        if not classes:
            raise UserError(
                f"data.path={where}: has no class subfolders (found the {stray[min(stray)]} {min(stray)!r}); "
                f"move the images to {where}/CLASS/NAME.png"
            )
        if stray:
            raise UserError(
                f"data.path={where}: the {stray[min(stray)]} {min(stray)!r} lies beside the class folders; "
                "move it into a class folder or out of the data folder"
            )
        classes.sort()
        counts = []

        def files() -> Iterator[str]:
            with ThreadPoolExecutor(_THREADS) as pool:
                for found in pool.map(lambda name: _images_of_class(root, name), classes):
                    counts.append(len(found))
                    yield from found

        names = PackedNames.from_iterable(files())
        labels = np.repeat(np.arange(len(classes), dtype=np.int64), counts)
        return ImageFolder(root, names, labels, tuple(classes))


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """The entries of a folder that are not hidden, in the file system's order."""
    where = printable(str(folder))
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith(".") and entry.name.lower() not in _IGNORED:
                    yield entry
    except PermissionError:
        raise UserError(f"data.path: no permission to list {where}; fix with chmod a+rx {where}") from None
    except OSError as error:
        raise UserError(f"data.path: {where} cannot be listed ({error.strerror}); rename or remove it") from None


def _images_of_class(root: Path, name: str) -> list[str]:
    """The images of one class folder, sorted, as paths relative to root."""
    found = []
    where, folder = printable(str(root)), printable(str(root / name))
    for entry in _entries(root / name):
        what = kind(entry)
        if what == "folder":
            raise UserError(
                f"data.path={where}: class {name!r} contains the folder {entry.name!r}; "
                f"images must lie directly in {folder}"
            )
        if what is None:
            continue
        path = printable(entry.path)
        if not (what == "file" or what.startswith("link")):  # a link that leads nowhere is a broken image
            raise UserError(f"{path}: is a {what}, not an image; remove it")
        if not entry.name.lower().endswith(EXTENSIONS):
            raise UserError(
                f"{path}: is {'not an image by its name' if what == 'file' else f'a {what}'}; "
                f"remove it or convert it (readable: {' '.join(EXTENSIONS)})"
            )
        found.append(f"{name}/{entry.name}")
    if not found:
        raise UserError(f"data.path={where}: class {name!r} has no images; add some or remove the folder {folder}")
    return sorted(found)
