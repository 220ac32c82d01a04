"""The centre crop that ADM (Dhariwal and Nichol 2021), DiT and EDM2 prepare and evaluate their images with.

While the shorter side is at least twice the crop, the image is halved with a box filter; then it is resized
bicubically so that the shorter side equals the crop, and the centre square is cut out. The references enlarge
an image whose shorter side is below the crop the same way; here that has to be asked for. Written from that
description for Pillow, whose bicubic filter widens with the reduction (antialiased). EXIF orientation is not
applied, as in the references: the pixels are taken as they are stored.
"""

from typing import IO

import numpy as np
from PIL import Image


def read_crop(file: str | IO[bytes], size: int, channels: int, enlarge: bool = False) -> np.ndarray:
    """The crop of an image file as uint8 [size, size, channels]; channels 1 (luma) or 3 (RGB, alpha dropped).

    file: a path, or the encoded image as an open binary file. Raises OSError (Pillow's words) when it is not a
    readable image, ValueError when it is too small (as adm_crop).
    """
    with Image.open(file) as image:
        return adm_crop(image.convert("L" if channels == 1 else "RGB"), size, enlarge)


def adm_crop(image: Image.Image, size: int, enlarge: bool = False) -> np.ndarray:
    """The centre crop of a mode L or RGB image as uint8 [size, size, 1 or 3].

    Raises ValueError when the shorter side is below `size`, unless `enlarge`.
    """
    if image.mode not in ("L", "RGB"):
        raise ValueError(f"image mode {image.mode}: must be L or RGB; convert the image first")
    if min(image.size) < size and not enlarge:
        raise ValueError(f"{image.width}x{image.height} image is smaller than the {size}x{size} crop")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    pixels = np.asarray(image.crop((left, top, left + size, top + size)))
    return pixels.reshape(size, size, -1)
