"""The four scales of a sample, stated once.

    raw pixels       uint8, 0..255                             on disk, in the loaders' threads, in pictures
    images           float32, [-1, 1] = pixels / 127.5 - 1     what pixel denoisers, Psi and judges see; encoder's input
    raw latents      float, as the autoencoder's encoder gives     in the cache, as mean and standard deviation
    scaled latents   float32, (raw - shift) * scale            what latent denoisers and Psi see; about unit variance

Stable Diffusion's autoencoder has scale 0.18215 and no shift. LightningDiT's latents have one of each for a channel.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Self

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
    """Between raw and scaled latents: of any shape, or [..., c, h, w] with a scale and a shift for each channel."""

    scale: float | tuple[float, ...]
    shift: float | tuple[float, ...] = 0.0

    @classmethod
    def of(cls, space: Mapping[str, Any]) -> Self:
        """From the JSON values "scale" and "shift", as `to_json` gives them."""
        return cls(*(tuple(value) if isinstance(value := space[key], list) else value for key in cls._fields))

    def to_json(self) -> dict[str, float | list[float]]:
        return {key: list(value) if isinstance(value, tuple) else value for key, value in self._asdict().items()}

    def to_scaled(self, raw: Tensor) -> Tensor:
        """(raw - shift) * scale."""
        return (raw - _along(self.shift, raw)) * _along(self.scale, raw)

    def to_raw(self, scaled: Tensor) -> Tensor:
        """scaled / scale + shift."""
        return scaled / _along(self.scale, scaled) + _along(self.shift, scaled)


def _along(values: float | tuple[float, ...], latents: Tensor) -> float | Tensor:
    """One number for all, or one for each channel of [..., c, h, w]."""
    return latents.new_tensor(values).view(-1, 1, 1) if isinstance(values, tuple) else values
