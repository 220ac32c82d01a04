"""The centre crop that ADM (Dhariwal and Nichol 2021), DiT and EDM2 prepare and evaluate their images with.

While the shorter side is at least twice the crop, the image is halved with a box filter; then it is resized
bicubically so that the shorter side equals the crop, and the centre square is cut out. Written from that
description for Pillow, whose bicubic filter widens with the reduction (antialiased). EXIF orientation is not
applied, as in the references: the pixels are taken as they are stored.
"""

import numpy as np
from PIL import Image


def read_crop(path: str, size: int, channels: int) -> np.ndarray:
    """The crop of an image file as uint8 [size, size, channels]; channels 1 (luma) or 3 (RGB, alpha dropped).

    Raises OSError (Pillow's words) for a file that is not a readable image, ValueError for one that is too
    small.
    """
    with Image.open(path) as image:
        return adm_crop(image.convert("L" if channels == 1 else "RGB"), size)


def adm_crop(image: Image.Image, size: int) -> np.ndarray:
    """The centre crop of a mode L or RGB image as uint8 [size, size, 1 or 3].

    Raises ValueError when the shorter side is below `size`: the crop never enlarges.
    """
    if image.mode not in ("L", "RGB"):
        raise ValueError(f"image mode {image.mode}: must be L or RGB; convert the image first")
    if min(image.size) < size:
        raise ValueError(f"{image.width}x{image.height} image is smaller than the {size}x{size} crop")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    pixels = np.asarray(image.crop((left, top, left + size, top + size)))
    return pixels.reshape(size, size, -1)
