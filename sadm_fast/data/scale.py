"""The four scales of a sample, stated once.

    raw pixels       uint8, 0..255                             on disk, in the loaders' threads, in pictures
    images           float32, [-1, 1] = pixels / 127.5 - 1     what pixel denoisers, Psi and judges see; encoder's input
    raw latents      float, as the autoencoder's encoder gives     in the cache, as mean and standard deviation
    scaled latents   float32, (raw - shift) * scale            what latent denoisers and Psi see; about unit variance

Stable Diffusion's autoencoder has scale 0.18215 and no shift.
"""

from typing import NamedTuple

from torch import Tensor


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
