"""What lies at a path, where no configuration says it."""

from collections.abc import Callable
from pathlib import Path

from sadm_fast.data import open_images
from sadm_fast.data.latents import ENCODING, MANIFEST, LatentSource
from sadm_fast.data.source import ImageSource


def open_any(path: str, progress: Callable[[int, int], None] | None = None) -> ImageSource | LatentSource:
    """Cached latents, WebDataset tar shards or an image folder, by what the folder holds; UserError as theirs."""
    root = Path(path).expanduser()
    if (root / MANIFEST).exists() or (root / ENCODING).exists():
        return LatentSource.open(root)
    shards = root.suffix == ".tar" or (root.is_dir() and any(root.glob("*.tar")))
    return open_images(path, kind="webdataset" if shards else "folder", progress=progress)
