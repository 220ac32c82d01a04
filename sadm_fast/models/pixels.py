"""Pixels as networks trained on ImageNet expect them."""

import torch
from torch import Tensor, nn


class ImageNetPixels(nn.Module):
    """Pixels [B, 3, H, W] in [-1, 1], normalised by ImageNet's mean and deviation of values in [0, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor((0.485, 0.456, 0.406)).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor((0.229, 0.224, 0.225)).view(1, 3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return ((x + 1) / 2 - self.mean) / self.std
