"""The four scales of a sample: raw pixels, images, raw latents, scaled latents."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sadm_fast.data.batch import float_to_pixels, pixels_to_float
from sadm_fast.data.scale import LatentScale


def test_raw_pixels_stand_for_images_from_minus_one_to_one() -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    images = pixels_to_float(pixels)
    assert images.dtype == torch.float32 and images[[0, 255]].tolist() == [-1.0, 1.0]
    assert torch.equal(float_to_pixels(images), pixels)


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
