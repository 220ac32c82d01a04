"""adm_crop against cases worked out by hand; fast_crop against Pillow: halvings to the pixel, the rest to a level."""

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sadm_fast.data.adm_crop import adm_crop, fast_crop, halve, read_crop
from tests.data.photographs import write_photographs


def test_an_image_of_the_crop_size_is_untouched(photo: Any) -> None:
    image = photo(24, 24, seed=1)
    np.testing.assert_array_equal(adm_crop(image, 24), np.asarray(image))


@pytest.mark.parametrize("width, height, left, top", [(13, 8, 2, 0), (8, 13, 0, 2)])
def test_the_centre_is_rounded_down(photo: Any, width: int, height: int, left: int, top: int) -> None:
    image = photo(width, height, seed=2)
    np.testing.assert_array_equal(adm_crop(image, 8), np.asarray(image)[top : top + 8, left : left + 8])


def test_twice_the_crop_is_halved_by_the_mean_of_each_two_by_two_block(photo: Any) -> None:
    pixels = np.asarray(photo(32, 32, seed=3)).astype(np.float64)
    mean = pixels.reshape(16, 2, 16, 2, 3).mean(axis=(1, 3))
    # Pillow rounds after the horizontal and after the vertical pass: half a level each.
    assert np.abs(adm_crop(Image.fromarray(pixels.astype(np.uint8)), 16) - mean).max() <= 1.0


def test_between_once_and_twice_the_crop_is_one_bicubic_step(photo: Any) -> None:
    image = photo(60, 45, seed=4)
    expected = np.asarray(image.resize((40, 30), Image.Resampling.BICUBIC))[:, 5:35]
    np.testing.assert_array_equal(adm_crop(image, 30), expected)


def test_grey_keeps_one_channel() -> None:
    assert adm_crop(Image.new("L", (20, 30), 7), 10).shape == (10, 10, 1)


def test_an_image_smaller_than_the_crop_is_refused_with_both_sizes() -> None:
    with pytest.raises(ValueError, match="20x9 image is smaller than the 10x10 crop"):
        adm_crop(Image.new("L", (20, 9)), 10)


@pytest.mark.parametrize("width, height", [(8, 13), (7, 3), (9, 10)])
def test_a_smaller_image_is_enlarged_bicubically_when_asked(photo: Any, width: int, height: int) -> None:
    image = photo(width, height, seed=6)
    scale = 10 / min(width, height)
    enlarged = np.asarray(image.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC))
    top, left = (enlarged.shape[0] - 10) // 2, (enlarged.shape[1] - 10) // 2
    np.testing.assert_array_equal(adm_crop(image, 10, enlarge=True), enlarged[top : top + 10, left : left + 10])


def test_an_encoded_image_in_memory_is_read_like_a_file(photo: Any, tmp_path: Path) -> None:
    photo(12, 12, seed=7).save(tmp_path / "a.jpg")
    from_memory = read_crop(io.BytesIO((tmp_path / "a.jpg").read_bytes()), 12, 3)
    np.testing.assert_array_equal(from_memory, read_crop(str(tmp_path / "a.jpg"), 12, 3))


def _recipe(image: Image.Image, size: int) -> np.ndarray:
    """The recipe as it is told, beside the module: halve, resize, cut."""
    width, height = image.size
    while width >= 2 * size and height >= 2 * size:
        width, height = width // 2, height // 2
        image = image.resize((width, height), resample=Image.Resampling.BOX)
    if width < height:
        width, height = size, round(height * (size / width))
    else:
        width, height = round(width * (size / height)), size
    pixels = np.array(image.resize((width, height), resample=Image.Resampling.BICUBIC))
    first_row, first_column = (height - size) // 2, (width - size) // 2
    return pixels[first_row:, first_column:][:size, :size].reshape(size, size, -1)


def test_a_mode_that_cannot_be_resized_faithfully_is_refused() -> None:
    with pytest.raises(ValueError, match="mode P: must be L or RGB"):
        adm_crop(Image.new("P", (20, 20)), 10)


def test_alpha_is_dropped_and_orientation_not_applied(photo: Any, tmp_path: Path) -> None:
    image = photo(12, 12, seed=5)
    transparent = image.copy()
    transparent.putalpha(40)
    transparent.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_crop(str(tmp_path / "a.png"), 12, 3), np.asarray(image))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees to display
    image.save(tmp_path / "b.png", exif=exif)
    np.testing.assert_array_equal(read_crop(str(tmp_path / "b.png"), 12, 3), np.asarray(image))


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 10_007 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def levels(image: np.ndarray, size: int, mirror: bool = False) -> np.ndarray:
    """fast_crop as uint8 levels [size, size, C], which its floats stand for exactly."""
    out = np.empty((image.shape[2], size, size), np.float32)
    fast_crop(image, size, mirror, out)
    back = (out + 1.0) * 127.5
    whole = np.round(back)
    assert np.abs(back - whole).max() < 1e-4
    return whole.astype(np.uint8).transpose(1, 2, 0)


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


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_photographs_are_cropped_by_the_recipe_to_the_pixel_and_fast_to_a_level(
    photographs: list[Path], mode: str
) -> None:
    for path in photographs:
        with Image.open(path) as opened:
            image = opened.convert(mode)
        pixels = np.array(image).reshape(image.height, image.width, -1)
        for size in (64, 128, 256, 512):
            expected = adm_crop(image, size, enlarge=True)
            assert expected.dtype == np.uint8
            assert np.array_equal(expected, _recipe(image, size)), path.name
            difference = levels(pixels, size).astype(np.int64) - expected
            assert np.abs(difference).max() <= 2, path.name
            error = float(np.mean(difference**2))
            assert error == 0 or 10 * math.log10(255**2 / error) >= FLOOR, path.name
