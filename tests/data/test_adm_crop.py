"""The ADM crop against cases worked out by hand."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sadm_fast.data.adm_crop import adm_crop, read_crop
from tests.data.photographs import write_photographs


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_photographs(tmp_path_factory.mktemp("photographs"))


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


def _recipe(path: Path, size: int, mode: str) -> np.ndarray:
    """The recipe as it is told, beside the module: halve, resize, cut."""
    image = Image.open(path).convert(mode)
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


@pytest.mark.parametrize("channels, mode", [(3, "RGB"), (1, "L")])
@pytest.mark.parametrize("size", [64, 256, 512])
def test_photographs_are_cropped_by_the_recipe_to_the_pixel(
    photographs: list[Path], size: int, channels: int, mode: str
) -> None:
    for path in photographs:
        crop = read_crop(str(path), size, channels, enlarge=True)
        assert crop.dtype == np.uint8
        np.testing.assert_array_equal(crop, _recipe(path, size, mode), err_msg=path.name)


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
