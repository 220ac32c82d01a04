"""Image folders made on the spot."""

import io
import tarfile
from collections.abc import Callable, Iterable
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


MakeShard = Callable[..., Path]


@pytest.fixture
def make_shard(tmp_path: Path) -> MakeShard:
    """make_shard(name, members: [(name, content)], format) -> the path of a tar file in the folder `shards`."""

    def make(name: str, members: Iterable[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> Path:
        path = tmp_path / "shards" / name
        path.parent.mkdir(exist_ok=True)
        with tarfile.open(path, "w", format=format) as archive:
            for member, content in members:
                header = tarfile.TarInfo(member)
                header.size = len(content)
                archive.addfile(header, io.BytesIO(content))
        return path

    return make


@pytest.fixture
def small_shards(small_folder: Path, make_shard: MakeShard) -> Path:
    """The images of the small folder, in the same order, as two shards of 6 and 5 samples."""
    paths = sorted(small_folder.glob("*/*.png"))
    labels = {"cat": b"0", "dog": b"1"}
    for shard, part in enumerate((paths[:6], paths[6:])):
        members = []
        for path in part:
            key = f"{path.parent.name}{path.stem}"
            members += [(f"{key}.cls", labels[path.parent.name]), (f"{key}.png", path.read_bytes())]
        root = make_shard(f"{shard:03d}.tar", members).parent
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has a cache folder of its own, not yet there."""
    monkeypatch.setenv("SADM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """[how many pipelines were built]"""
    from sadm_fast.data import dali_loader

    count, real = [0], dali_loader.decode_pipeline

    def build(*arguments: Any, **options: Any) -> Any:
        count[0] += 1
        return real(*arguments, **options)

    monkeypatch.setattr(dali_loader, "decode_pipeline", build)
    return count


@pytest.fixture(scope="session")
def demo_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo set, written once for all tests."""
    return demo_folder("demo:mnist5k", tmp_path_factory.mktemp("cache"))
