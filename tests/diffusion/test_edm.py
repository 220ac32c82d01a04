"""EDM against the closed forms of Karras et al. 2022, Table 1."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import LogNormal

from sadm_fast.diffusion import EDM

quick = settings(deadline=None, max_examples=40)
EPS = torch.finfo(torch.float32).eps
sigmas = st.lists(st.floats(2.0**-9, 80.0, width=32), min_size=1, max_size=6)
processes = st.builds(EDM, sigma_data=st.sampled_from([0.25, 0.5, 1.0]))


def batch(size: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    x0, noise, other = torch.randn(3, size, 2, 3, 3, generator=torch.Generator().manual_seed(seed))
    return 0.5 * x0, noise, other


def coefficients(process: EDM, sigma: float) -> tuple[float, float, float]:
    """c_skip, c_out, c_in of Table 1."""
    d = process.sigma_data
    total = sigma**2 + d**2
    return d**2 / total, sigma * d / math.sqrt(total), 1 / math.sqrt(total)


@quick
@given(levels=sigmas, seed=st.integers(0, 99))
def test_noise_of_deviation_t_is_added_to_the_unscaled_image(levels: list[float], seed: int) -> None:
    t = torch.tensor(levels)
    x0, noise, _ = batch(len(levels), seed)
    alpha, sigma = EDM().alpha_sigma(t)
    assert torch.equal(alpha, torch.ones_like(t)) and torch.equal(sigma, t)
    torch.testing.assert_close(EDM().add_noise(x0, noise, t), x0 + t.view(-1, 1, 1, 1) * noise, rtol=2 * EPS, atol=0)
    torch.testing.assert_close(EDM().log_snr(t), -2 * t.log(), rtol=2 * EPS, atol=EPS)


@quick
@given(process=processes, levels=sigmas, seed=st.integers(0, 99))
def test_output_and_input_are_preconditioned(process: EDM, levels: list[float], seed: int) -> None:
    t = torch.tensor(levels)
    x0, noise, output = batch(len(levels), seed)
    x_t = process.add_noise(x0, noise, t)
    images, time = process.model_input(x_t, t)
    found = process.to_x0(output, x_t, t)
    for i, sigma in enumerate(t.tolist()):
        c_skip, c_out, c_in = coefficients(process, sigma)
        torch.testing.assert_close(images[i], c_in * x_t[i], rtol=8 * EPS, atol=0)
        # Two terms of opposite sign may cancel: the error is relative to the larger one.
        scale = float((c_skip * x_t[i]).abs().max() + (c_out * output[i]).abs().max())
        torch.testing.assert_close(found[i], c_skip * x_t[i] + c_out * output[i], rtol=0, atol=8 * EPS * scale)
    # The paper's c_noise = ln(sigma) / 4, stretched by 400 to the range that DiT's embedding resolves.
    torch.testing.assert_close(time, 400 * (t.log() / 4), rtol=4 * EPS, atol=1e-4)
    assert found.dtype == images.dtype == time.dtype == torch.float32


def test_the_networks_time_fits_its_embedding() -> None:
    """Levels that differ by 1% are a whole step apart, and all lie within the embedding's period of 10000."""
    _, time = EDM().model_input(torch.zeros(3, 1, 1, 1), torch.tensor([0.002, 0.00202, 80.0]))
    assert float(time[1] - time[0]) == pytest.approx(100 * math.log(1.01), rel=1e-3)
    assert time.abs().max() < 1000


@quick
@given(process=processes, levels=sigmas, seed=st.integers(0, 99))
def test_the_networks_target_gives_back_x0(process: EDM, levels: list[float], seed: int) -> None:
    t = torch.tensor(levels)
    x0, noise, _ = batch(len(levels), seed)
    x_t = process.add_noise(x0, noise, t)
    c_skip, c_out, _ = (
        torch.tensor(c).view(-1, 1, 1, 1) for c in zip(*(coefficients(process, s) for s in t.tolist()), strict=True)
    )
    found = process.to_x0((x0 - c_skip * x_t) / c_out, x_t, t)
    assert ((found - x0).abs() <= 16 * EPS * (x0.abs() + (c_skip * x_t).abs())).all()


@quick
@given(process=processes, levels=sigmas)
def test_the_weight_makes_the_networks_own_error_count_alike_at_every_level(process: EDM, levels: list[float]) -> None:
    t = torch.tensor(levels)
    c_out = torch.tensor([coefficients(process, s)[1] for s in t.tolist()])
    torch.testing.assert_close(process.loss_weight(t) * c_out.square(), torch.ones(len(t)), rtol=16 * EPS, atol=0)


@quick
@given(process=processes, levels=sigmas)
def test_the_networks_input_and_target_have_variance_one(process: EDM, levels: list[float]) -> None:
    """For data of deviation sigma_data: the property that the coefficients were derived from."""
    for sigma in levels:
        c_skip, c_out, c_in = coefficients(process, sigma)
        d2 = process.sigma_data**2
        images, _ = process.model_input(torch.ones(1, 1, 1, 1), torch.tensor([sigma]))
        assert float(images) ** 2 * (d2 + sigma**2) == pytest.approx(1.0, rel=16 * EPS)
        weight = float(process.loss_weight(torch.tensor([sigma])))
        target = (1 - c_skip) ** 2 * d2 + c_skip**2 * sigma**2
        assert weight * target == pytest.approx(1.0, rel=32 * EPS)


def test_training_levels_are_log_normal_and_rise_with_u() -> None:
    process = EDM(p_mean=-0.4, p_std=1.0)
    u = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    t = process.sample_t(u)
    assert t.dtype == torch.float32 and (t.diff() > 0).all()
    expected = LogNormal(torch.tensor(-0.4, dtype=torch.float64), 1.0)
    torch.testing.assert_close(expected.cdf(t.double()), u, rtol=0, atol=1e-6)
    ends = process.sample_t(torch.tensor([2.0**-33, 1 - 2.0**-33], dtype=torch.float64))
    assert ends.isfinite().all() and (ends > 0).all()


def test_there_is_nothing_else_to_train() -> None:
    x0, noise, output = batch(2)
    assert EDM().variance_loss(output, x0, noise, torch.ones(2)) is None
    assert EDM().output_channels(4) == 4
