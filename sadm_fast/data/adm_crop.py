"""The centre crop that ADM (Dhariwal and Nichol 2021), DiT and EDM2 prepare and evaluate their images with.

While the shorter side is at least twice the crop, the image is halved with a box filter; then it is resized
bicubically so that the shorter side equals the crop, and the centre square is cut out. The references enlarge
an image whose shorter side is below the crop the same way; here that has to be asked for. Written from that
description for Pillow, whose bicubic filter widens with the reduction (antialiased). EXIF orientation is not
applied, as in the references: the pixels are taken as they are stored.
"""

from typing import IO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from sadm_fast.scales import write_images


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


def fast_crop(image: np.ndarray, size: int, mirror: bool, out: np.ndarray) -> None:
    """Crop a decoded image uint8 [H, W, C], mirrored or not, into out float32 [C, size, size] in [-1, 1].

    Several times as fast as `adm_crop` and within one level of it. Box halvings are averages of uint8 in numpy, equal
    to Pillow's. The bicubic step is torch's antialiased resize of uint8, which sums the same weights in vector
    registers and rounds between its two passes like Pillow; single levels differ where a sum falls on the edge of a
    rounding. Everything runs in the calling thread, so that a pool can crop many images at once: torch's own
    elementwise operations would each start threads of their own. An image whose shorter side is below `size` is
    enlarged.
    """
    planes = image.transpose(2, 0, 1)
    if min(image.shape[:2]) >= 2 * size:
        planes = np.ascontiguousarray(planes)  # pairs of single bytes are averaged faster than pairs of pixels
    while min(planes.shape[1:]) >= 2 * size:
        planes = halve(halve(planes, 2), 1)
    height, width = planes.shape[1:]
    scale = size / min(height, width)
    resized = round(height * scale), round(width * scale)
    if resized != (height, width):
        planes = F.interpolate(torch.from_numpy(planes)[None], resized, mode="bicubic", antialias=True)[0].numpy()
    top, left = (resized[0] - size) // 2, (resized[1] - size) // 2
    crop = planes[:, top : top + size, left : left + size]
    crop = np.ascontiguousarray(crop[:, :, ::-1] if mirror else crop)
    write_images(crop, out)


def halve(pixels: np.ndarray, axis: int) -> np.ndarray:
    """Pillow's box filter to half the length of an axis, rounded down; uint8 of any shape.

    Pairs are averaged; of an odd length 2k + 1 the pairs lie at both ends and a triple is between them.
    """

    def part(chosen: slice) -> np.ndarray:
        return pixels[(slice(None),) * axis + (chosen,)]

    k, odd = divmod(pixels.shape[axis], 2)
    if not odd:
        return _mean(part(slice(0, None, 2)), part(slice(1, None, 2)))
    middle = (k + 1) // 2 - 1  # one of this and the next output is of three pixels; all others are of two
    rest = 2 * (middle + 2) + 1
    parts = [_mean(part(slice(0, 2 * middle, 2)), part(slice(1, 2 * middle, 2)))]
    parts += [_average(part(_window(i, k)), axis) for i in (middle, middle + 1) if i < k]
    parts.append(_mean(part(slice(rest, None, 2)), part(slice(rest + 1, None, 2))))
    return np.concatenate(parts, axis)


def _window(i: int, k: int) -> slice:
    """The pixels of 2k + 1 that Pillow averages to output i, in its own arithmetic: a centre may lie on an edge."""
    scale = (2 * k + 1) / k
    center = (i + 0.5) * scale
    first, last = int(center - 0.5 * scale + 0.5), int(center + 0.5 * scale + 0.5)
    inside = [x for x in range(first, last) if -0.5 < (x - center + 0.5) * (1.0 / scale) <= 0.5]
    return slice(inside[0], inside[-1] + 1)


def _average(pixels: np.ndarray, axis: int) -> np.ndarray:
    """The mean over an axis, which is kept, with Pillow's weights: multiples of 2^-22."""
    weight = int(0.5 + 2**22 / pixels.shape[axis])
    total = pixels.astype(np.int64).sum(axis=axis, keepdims=True)
    return ((total * weight + 2**21) >> 22).astype(np.uint8)


def _mean(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(a + b + 1) // 2 of uint8, without a wider type."""
    return (a | b) - ((a ^ b) >> 1)
