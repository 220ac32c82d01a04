"""Weights of small judges, for evaluate.py --judges."""

from pathlib import Path

import torch

from sadm_fast.models import ViT


def small_vit(folder: Path) -> Path:
    """A file with a ViT of random weights that looks at 28 x 28 pixels and has 8 features."""
    vit = ViT(3, patch_size=14, width=8, depth=1, position_grid=2, input_size=28)
    torch.save(vit.state_dict(), folder / "vit.pt")
    return folder / "vit.pt"
