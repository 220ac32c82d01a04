"""The images on which loaders are measured: photographs of ImageNet's usual size, made here, and small PNGs."""

import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from sadm_fast.data.demo import demo_folder
from tests.data.photographs import COLOUR, photograph

CLASSES = 16
QUALITY = 92
LONG, SHORT = 500, 375  # pixels a side of most of ImageNet's images


def photographs(folder: Path, distinct: int = 256, count: int = 8192) -> Path:
    """Make root/class/name.jpg: `count` names for `distinct` JPEGs of 500x375 or 375x500 pixels, cut from photographs.

    There are enough names that no loader begins a second epoch while it is timed, and few enough files that they stay
    in the page cache. An existing folder is used as it is.
    """
    if folder.is_dir():
        return folder
    temporary = folder.with_name(f".{folder.name}-{os.getpid()}")
    originals = [photograph(name) for name in COLOUR]
    rng = np.random.default_rng(0)
    files: list[Path] = []
    for number in range(count):
        file = temporary / f"class{number % CLASSES:02}" / f"{number:06}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        if number < distinct:
            _cut(originals[number % len(originals)], rng).save(file, quality=QUALITY)
        else:
            _link(files[number % distinct], file)
        files.append(file)
    temporary.rename(folder)
    return folder


def digits() -> Path:
    """The 5,000 digits of the demo set: grey PNGs of 28x28 pixels."""
    return demo_folder("demo:mnist5k")


def _cut(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Cut a piece out of a photograph that is first resampled to 1 to 1.3 times the piece's size."""
    width, height = (LONG, SHORT) if rng.random() < 0.75 else (SHORT, LONG)
    scale = max(width / image.width, height / image.height) * rng.uniform(1, 1.3)
    size = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    image = image.resize(size, Image.Resampling.LANCZOS)
    left, top = int(rng.integers(image.width - width + 1)), int(rng.integers(image.height - height + 1))
    return image.crop((left, top, left + width, top + height))


def _link(file: Path, name: Path) -> None:
    try:
        name.hardlink_to(file)
    except OSError:
        shutil.copyfile(file, name)
