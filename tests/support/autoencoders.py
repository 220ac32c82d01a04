"""A small AutoencoderKL, made on the spot: 3 channels to 4, sides halved once."""

from pathlib import Path
from typing import Any

import torch


def save_autoencoder(path: Path, seed: int = 0, **changes: Any) -> Path:
    """Save one with random weights of `seed` to `path`, as diffusers does; returns the path."""
    from diffusers import AutoencoderKL

    options: dict[str, Any] = {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "scaling_factor": 0.5,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        AutoencoderKL(**options | changes).save_pretrained(path)
    return path
