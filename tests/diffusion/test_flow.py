"""Rectified flow against its closed forms."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal

from sadm_fast.diffusion import Flow

quick = settings(deadline=None, max_examples=40)
EPS = torch.finfo(torch.float32).eps
times = st.lists(st.floats(2.0**-12, 1 - 2.0**-12, width=32), min_size=1, max_size=6)


def batch(size: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    x0, noise, other = torch.randn(3, size, 2, 3, 3, generator=torch.Generator().manual_seed(seed))
    return x0, noise, other


@quick
@given(ts=times, seed=st.integers(0, 99))
def test_x_t_lies_on_the_straight_line_from_image_to_noise(ts: list[float], seed: int) -> None:
    process, t = Flow(), torch.tensor(ts)
    x0, noise, _ = batch(len(ts), seed)
    alpha, sigma = process.alpha_sigma(t)
    assert torch.equal(alpha, 1 - t) and torch.equal(sigma, t)
    torch.testing.assert_close(process.add_noise(x0, noise, t), torch.lerp(x0, noise, t.view(-1, 1, 1, 1)))
    expected = 2 * torch.log((1 - t.double()) / t.double())
    torch.testing.assert_close(process.log_snr(t).double(), expected, rtol=4 * EPS, atol=8 * EPS)


@quick
@given(ts=times, seed=st.integers(0, 99))
def test_the_true_velocity_gives_back_x0(ts: list[float], seed: int) -> None:
    process, t = Flow(), torch.tensor(ts)
    x0, noise, _ = batch(len(ts), seed)
    found = process.to_x0(noise - x0, process.add_noise(x0, noise, t), t)
    assert ((found - x0).abs() <= 8 * EPS * (x0.abs() + noise.abs())).all()


@quick
@given(ts=times, seed=st.integers(0, 99))
def test_the_weighted_error_of_x0_is_the_error_of_the_velocity(ts: list[float], seed: int) -> None:
    process, t = Flow(), torch.tensor(ts)
    x0, noise, output = batch(len(ts), seed)
    # In float64 nothing is lost in x0 - xhat0 at small t; to_x0 itself is float32, so its own error is allowed for.
    xhat0 = process.to_x0(output, process.add_noise(x0, noise, t), t)
    weighted = process.loss_weight(t) * (x0 - xhat0).square().flatten(1).mean(1)
    expected = (noise - x0 - output).square().flatten(1).mean(1)
    error = 8 * EPS * (x0.abs() + noise.abs()).flatten(1).amax(1) / t
    assert ((weighted.sqrt() - expected.sqrt()).abs() <= error + 4 * EPS * expected.sqrt()).all()


def test_uniform_training_levels_are_u_itself() -> None:
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    t = Flow().sample_t(u)
    assert t.dtype == torch.float32
    torch.testing.assert_close(t, u.float())


def test_logit_normal_training_levels() -> None:
    process = Flow(t_mean=0.5, t_std=1.2)
    u = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    t = process.sample_t(u).double()
    assert (t.diff() > 0).all()
    expected = Normal(torch.tensor(0.5, dtype=torch.float64), 1.2).cdf(torch.logit(t))
    torch.testing.assert_close(expected, u, rtol=0, atol=1e-5)


def test_the_ends_are_kept_away_from_infinite_weights_and_log_snr() -> None:
    for process in (Flow(), Flow(t_std=3.0)):
        t = process.sample_t(torch.tensor([2.0**-33, 1 - 2.0**-33], dtype=torch.float64))
        assert (t > 0).all() and (t < 1).all()
        assert process.loss_weight(t).isfinite().all() and process.log_snr(t).isfinite().all()


def test_the_network_sees_x_t_and_thousandths() -> None:
    x_t, *_ = batch(2)
    images, time = Flow().model_input(x_t, torch.tensor([0.25, 1.0]))
    assert images is x_t and time.tolist() == [250.0, 1000.0]


def test_there_is_nothing_else_to_train() -> None:
    x0, noise, output = batch(2)
    assert Flow().variance_loss(output, x0, noise, torch.full((2,), 0.5)) is None
    assert Flow().output_channels(4) == 4


@quick
@given(ts=times, seed=st.integers(0, 99))
def test_a_network_whose_time_runs_to_the_data_gives_the_same_x0(ts: list[float], seed: int) -> None:
    process, t = Flow(to_data=True), torch.tensor(ts)
    x0, noise, _ = batch(len(ts), seed)
    x_t = process.add_noise(x0, noise, t)
    x_in, tau = process.model_input(x_t, t)
    assert torch.equal(x_in, x_t) and torch.equal(tau, 1 - t)
    # SiT's path and target: x = tau data + (1 - tau) noise, dx/dtau = data - noise.
    share = tau.view(-1, 1, 1, 1)
    torch.testing.assert_close(x_t, share * x0 + (1 - share) * noise, rtol=4 * EPS, atol=4 * EPS)
    found = process.to_x0(x0 - noise, x_t, t)
    assert ((found - x0).abs() <= 8 * EPS * (x0.abs() + noise.abs())).all()
