"""The scale of pixels."""

import torch

from sadm_fast.data.batch import float_to_pixels, pixels_to_float


def test_every_pixel_value_maps_into_minus_one_to_one_and_back() -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    images = pixels_to_float(pixels)
    assert images.dtype == torch.float32
    assert images[0] == -1.0 and images[255] == 1.0
    # One rounding of the quotient (near 2) and one of the difference: 2^-23 each at most.
    torch.testing.assert_close(images.double(), pixels.double() / 127.5 - 1, rtol=0, atol=2.0**-22)
    assert torch.equal(float_to_pixels(images), pixels)


def test_what_lies_outside_is_clipped() -> None:
    assert float_to_pixels(torch.tensor([-3.0, 1.01])).tolist() == [0, 255]
