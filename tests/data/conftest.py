"""Image folders made on the spot."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sadm_fast.data.demo import demo_folder


def _photo(width: int, height: int, seed: int) -> Image.Image:
    """A photo-like RGB image: noise with a 1/f spectrum, as natural images have, plus hard edges."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1.0
    shape = (3, *frequency.shape)
    spectrum = (rng.normal(size=shape) + 1j * rng.normal(size=shape)) / frequency
    pixels = np.fft.irfft2(spectrum, s=(height, width)).transpose(1, 2, 0)
    pixels = 128 + 50 * pixels / pixels.std()
    for _ in range(6):
        left, top = rng.integers(width), rng.integers(height)
        pixels[top : top + height // 5, left : left + width // 6] += rng.normal(0, 40, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture
def photo() -> Callable[..., Image.Image]:
    """photo(width, height, seed) -> a photo-like RGB image."""
    return _photo


MakeFolder = Callable[..., Path]


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """make_folder(images: {"class/name.ext": Image}, save options for every image) -> root."""

    def make(images: dict[str, Image.Image], **options: Any) -> Path:
        root = tmp_path / "images"
        for name, image in images.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path, **options)
        return root

    return make


@pytest.fixture
def small_folder(make_folder: MakeFolder) -> Path:
    """Two classes, 7 and 4 different grey 8x8 images."""
    rng = np.random.default_rng(0)
    names = [f"cat/{i}.png" for i in range(7)] + [f"dog/{i}.png" for i in range(4)]
    return make_folder({name: Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)) for name in names})


@pytest.fixture(scope="session")
def demo_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo set, written once for all tests."""
    return demo_folder("demo:mnist5k", tmp_path_factory.mktemp("cache"))
