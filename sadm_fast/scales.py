"""The four scales of a sample, stated once.

    raw pixels       uint8, 0..255                             on disk, in the loaders' threads, in pictures
    images           float32, [-1, 1] = pixels / 127.5 - 1     what pixel denoisers, Psi and judges see; encoder's input
    raw latents      float, as the autoencoder's encoder gives     in the cache, as mean and standard deviation
    scaled latents   float32, (raw - shift) * scale            what latent denoisers and Psi see; about unit variance

Stable Diffusion's autoencoder has scale 0.18215 and no shift.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_HALF_RANGE = 127.5


def pixels_to_float(pixels: Tensor) -> Tensor:
    """uint8 pixels of any shape to images float32 in [-1, 1], in a new tensor on the same device."""
    return pixels.to(torch.float32).div_(_HALF_RANGE).sub_(1.0)


def float_to_pixels(images: Tensor) -> Tensor:
    """Images of any shape and float dtype to uint8: the exact inverse of pixels_to_float, clipped."""
    return images.float().add(1.0).mul_(_HALF_RANGE).round_().clamp_(0, 255).to(torch.uint8)


def write_images(pixels: np.ndarray, out: np.ndarray) -> None:
    """Write uint8 pixels as images into `out` float32 of their shape; as pixels_to_float, without starting threads."""
    np.divide(pixels, np.float32(_HALF_RANGE), out=out, dtype=np.float32)
    np.subtract(out, np.float32(1.0), out=out)


class LatentScale(NamedTuple):
    """Between raw and scaled latents; tensors of any shape."""

    scale: float
    shift: float = 0.0

    def to_scaled(self, raw: Tensor) -> Tensor:
        """(raw - shift) * scale."""
        return (raw - self.shift) * self.scale

    def to_raw(self, scaled: Tensor) -> Tensor:
        """scaled / scale + shift."""
        return scaled / self.scale + self.shift
