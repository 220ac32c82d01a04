"""Small files of latents as LightningDiT's extract_features.py writes them."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


def write_lightning_latents(
    root: Path, count: int = 11, shape: tuple[int, int, int] = (4, 8, 8), classes: int = 3, stats: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Two files of two ranks and, with `stats`, latents_stats.pt; returns latents, latents_flip and labels in order."""
    root.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    latents, flipped = (3 * torch.randn(count, *shape, generator=generator) + torch.arange(shape[0]).view(-1, 1, 1)
                        for _ in range(2))  # fmt: skip
    labels = torch.arange(count) % classes
    for rank, part in enumerate((slice(0, count // 2), slice(count // 2, count))):
        tensors = {"latents": latents[part], "latents_flip": flipped[part], "labels": labels[part]}
        tensors = {name: value.contiguous() for name, value in tensors.items()}
        metadata = {"total_size": str(len(labels[part])), "dtype": str(latents.dtype), "device": "cpu"}
        save_file(tensors, root / f"latents_rank{rank:02d}_shard000.safetensors", metadata)
    if stats:
        mean, std = (latents.mean(dim=(0, 2, 3), keepdim=True), latents.std(dim=(0, 2, 3), keepdim=True))
        torch.save({"mean": mean, "std": std}, root / "latents_stats.pt")
    return latents, flipped, labels
