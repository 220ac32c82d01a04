"""The four scales of a sample: raw pixels, images, raw latents, scaled latents."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sadm_fast.scales import LatentScale, float_to_pixels, pixels_to_float


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


def test_stable_diffusions_latents_are_scaled_by_its_published_factor() -> None:
    assert float(LatentScale(0.18215).to_scaled(torch.tensor(2.0, dtype=torch.float64))) == pytest.approx(0.3643)


@settings(deadline=None)
@given(st.floats(1e-3, 10), st.floats(-3, 3), st.floats(-50, 50))
def test_scaled_latents_go_back_to_raw_ones(scale: float, shift: float, value: float) -> None:
    raw = torch.tensor([value], dtype=torch.float64)
    there = LatentScale(scale, shift).to_scaled(raw)
    torch.testing.assert_close(there, (raw - shift) * scale, rtol=0, atol=0)
    # Three roundings of numbers up to 53 + 3.
    torch.testing.assert_close(LatentScale(scale, shift).to_raw(there), raw, rtol=1e-14, atol=1e-13)
