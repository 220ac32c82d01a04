"""Small caches of latents, written as encode.py writes them, with numbers a test can recompute."""

from pathlib import Path
from typing import Any

import numpy as np

from sadm_fast.data.latents import MANIFEST, SHARDS, Encoding, shard_record, write_shard
from sadm_fast.files import write_json


def make_encoding(**changes: Any) -> Encoding:
    """11 images of 3 classes in shards of 4; latents [4, 4, 4] of 8-pixel images."""
    fields: dict[str, Any] = {
        "source": "5" * 64,
        "classes": ("ant", "bee", "cat"),
        "images": 11,
        "resolution": 8,
        "image_channels": 3,
        "enlarge": False,
        "autoencoder": "a" * 64,
        "precision": "fp32",
        "scale": 0.5,
        "shift": 0.25,
        "latent_channels": 4,
        "downsample": 2,
        "dtype": "float32",
        "shard_size": 4,
    }
    return Encoding(**fields | changes)


def make_moments(encoding: Encoding, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """moments [N, 2, 2, c, h, w] in the encoding's dtype, with positive deviations, and labels [N]."""
    rng = np.random.default_rng(seed)
    moments = rng.standard_normal((encoding.images, 2, 2, *encoding.latent_shape), dtype=np.float32)
    moments[:, :, 1] = np.abs(moments[:, :, 1])
    return moments.astype(encoding.dtype), np.sort(rng.integers(0, len(encoding.classes), encoding.images))


def write_cache(root: Path, encoding: Encoding | None = None, seed: int = 0, moments: np.ndarray | None = None) -> Path:
    """A finished cache of `make_moments`, or with other moments; returns root."""
    encoding = encoding or make_encoding()
    drawn, labels = make_moments(encoding, seed)
    moments = drawn if moments is None else moments
    (root / SHARDS).mkdir(parents=True)
    for shard in range(encoding.shards):
        part = slice(shard * encoding.shard_size, (shard + 1) * encoding.shard_size)
        write_shard(root, shard, moments[part], labels[part], [])
    records = [shard_record(root, shard) for shard in range(encoding.shards)]
    write_json(root / MANIFEST, {"encoding": encoding.to_json(), "count": encoding.images, "shards": records})
    return root
