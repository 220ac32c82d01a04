"""The peer of the loaders: how DiT's training script reads images, written from the description of its recipe.

An image-folder dataset that lists as torchvision's does, Pillow, the ADM centre crop, a random horizontal flip, a
float tensor normalised with mean and deviation 0.5, and PyTorch's DataLoader with its defaults. torchvision itself is
not needed: its classes add little to these.
"""

import os
from collections.abc import Generator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


class FolderOfImages(Dataset[tuple[Tensor, int]]):
    """Maps root/class/.../name.jpg to (float32 [3, size, size] in [-1, 1], class number)."""

    def __init__(self, root: str | Path, size: int) -> None:
        self._size = size
        classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        self.samples = [
            (os.path.join(folder, name), label)
            for label, class_name in enumerate(classes)
            for folder, _, names in sorted(os.walk(os.path.join(root, class_name), followlinks=True))
            for name in sorted(names)
            if name.lower().endswith(EXTENSIONS)
        ]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        with open(path, "rb") as file:
            image = Image.open(file).convert("RGB")
        image = center_crop(image, self._size)
        if torch.rand(1) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return pixels.to(torch.float32).div(255).sub_(0.5).div_(0.5), label


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Crop as ADM does: box halvings, a bicubic step to the shorter side, the centre; uint8 [size, size, 3]."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    pixels = np.array(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return Image.fromarray(pixels[top : top + size, left : left + size])


def batches(root: str | Path, *, size: int, micro_batch: int, workers: int) -> Generator[list[Tensor], None, None]:
    """Yield (images, labels) for ever, epoch after epoch; close() ends the workers."""
    loader = DataLoader(
        FolderOfImages(root, size), batch_size=micro_batch, shuffle=True, num_workers=workers, drop_last=True
    )
    while True:
        yield from loader
