"""The crop that the DALI loader makes on the CPU, against Pillow's: box halvings to the pixel, the rest to a level."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sadm_fast.data.adm_crop import adm_crop, read_crop
from sadm_fast.data.fast_crop import fast_crop, halve
from tests.data.photographs import write_photographs


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 10_007 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def levels(image: np.ndarray, size: int, mirror: bool = False) -> np.ndarray:
    """fast_crop as uint8 levels [size, size, C], which its floats stand for exactly."""
    out = np.empty((image.shape[2], size, size), np.float32)
    fast_crop(image, size, mirror, out)
    back = (out + 1.0) * 127.5
    np.testing.assert_allclose(back, np.round(back), atol=1e-4)
    return np.round(back).astype(np.uint8).transpose(1, 2, 0)


@settings(deadline=None, max_examples=200)
@given(st.integers(2, 3000))
def test_any_length_is_halved_exactly_as_pillow_does(length: int) -> None:
    pixels = noise(length, 4)
    tall = np.asarray(Image.fromarray(pixels).resize((4, length // 2), Image.Resampling.BOX))
    np.testing.assert_array_equal(halve(pixels, 0), tall)
    wide = np.ascontiguousarray(pixels.swapaxes(0, 1))
    np.testing.assert_array_equal(halve(wide, 1), tall.swapaxes(0, 1))


@pytest.mark.parametrize(
    "height, width, size", [(64, 64, 16), (32, 37, 16), (33, 32, 16), (131, 129, 32), (257, 300, 64)]
)
def test_crops_that_only_halve_are_exact(height: int, width: int, size: int) -> None:
    image = noise(height, width)
    np.testing.assert_array_equal(levels(image, size), adm_crop(Image.fromarray(image), size))


@pytest.mark.parametrize("size", [16, 40, 64, 100])
def test_a_mirrored_crop_is_the_crop_mirrored(size: int) -> None:
    image = noise(70, 90)
    np.testing.assert_array_equal(levels(image, size, mirror=True), levels(image, size)[:, ::-1])


# Peak signal-to-noise ratio of the worst photograph in dB; the least seen is 68.5. A level in every hundredth value is
# 68 dB: the sums that fall on the edge of a rounding.
FLOOR = 68.0


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_photographs(tmp_path_factory.mktemp("photographs"))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [64, 128, 256, 512])
def test_photographs_are_cropped_like_pillow(photographs: list[Path], size: int, channels: int) -> None:
    for path in photographs:
        with Image.open(path) as opened:
            image = np.array(opened.convert("RGB" if channels == 3 else "L"))
        image = image.reshape(*image.shape[:2], channels)
        expected = read_crop(str(path), size, channels, enlarge=True)
        difference = levels(image, size).astype(np.int64) - expected
        assert np.abs(difference).max() <= 2, path.name
        error = float(np.mean(difference**2))
        assert error == 0 or 10 * math.log10(255**2 / error) >= FLOOR, path.name
