"""The variance-preserving process against closed forms and torch.distributions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributions import Normal, kl_divergence

from sadm_fast.diffusion import VP
from sadm_fast.diffusion.process import Steps
from sadm_fast.diffusion.vp import _tables, kept_steps

quick = settings(deadline=None, max_examples=25)
EPS = torch.finfo(torch.float32).eps
ALL = torch.arange(1000)


def exact_alpha_bar(t: int) -> float:
    """prod_{s <= t} (1 - beta_s) of betas linear from 1e-4 to 0.02."""
    return math.prod(1.0 - (1e-4 + (0.02 - 1e-4) * s / 999) for s in range(t + 1))


def batch(size: int, channels: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    x0, noise = torch.randn(2, size, channels, 3, 3, generator=torch.Generator().manual_seed(seed))
    return x0.clamp(-1, 1), noise


def test_alpha_bar_starts_at_one_minus_the_first_beta() -> None:
    alpha, sigma = VP().alpha_sigma(torch.tensor([0]))
    assert float(alpha.double().square()) == pytest.approx(1.0 - 1e-4, rel=2 * EPS)
    assert float(sigma) == pytest.approx(0.01, rel=2 * EPS)


@pytest.mark.parametrize("t", [0, 1, 2, 10, 499, 998, 999])
def test_alpha_and_sigma_are_those_of_linear_betas(t: int) -> None:
    alpha, sigma = VP().alpha_sigma(torch.tensor([t]))
    # Two roundings to float32; the product itself is good to 1000 roundings of float64.
    assert float(alpha) == pytest.approx(math.sqrt(exact_alpha_bar(t)), rel=2 * EPS)
    assert float(sigma) == pytest.approx(math.sqrt(1.0 - exact_alpha_bar(t)), rel=2 * EPS)
    assert alpha.dtype == sigma.dtype == torch.float32


def test_alpha_bar_of_the_last_step_is_that_of_ddpm() -> None:
    # Ho et al. 2020, section 4: KL(q(x_T | x0) || N(0, 1)) is some 1e-5 bits a dimension.
    assert exact_alpha_bar(999) == pytest.approx(4.0358e-5, rel=1e-4)
    assert float(VP().alpha_sigma(ALL[-1:])[0].square()) == pytest.approx(4.0358e-5, rel=1e-4)


def test_the_process_preserves_variance_and_loses_signal_steadily() -> None:
    process = VP()
    alpha, sigma = process.alpha_sigma(ALL)
    torch.testing.assert_close(alpha.square() + sigma.square(), torch.ones(1000), rtol=0, atol=4 * EPS)
    assert (process.log_snr(ALL).diff() < 0).all()
    torch.testing.assert_close(process.log_snr(ALL), (alpha.double() / sigma.double()).log().mul(2).float())


def test_betas_are_linear() -> None:
    tables = _tables(1000, 1e-4, 0.02)
    expected = torch.tensor([1e-4 + (0.02 - 1e-4) * s / 999 for s in range(1000)], dtype=torch.float64)
    torch.testing.assert_close(tables["log_beta"].exp(), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("t", [1, 2, 57, 500, 999])
def test_the_posterior_is_that_of_bayes(t: int) -> None:
    """q(x_{t-1} | x_t, x0) ~ q(x_t | x_{t-1}) q(x_{t-1} | x0): precisions add, means are weighted by them."""
    tables = {name: float(values[t]) for name, values in _tables(1000, 1e-4, 0.02).items()}
    beta, before = 1e-4 + (0.02 - 1e-4) * t / 999, exact_alpha_bar(t - 1)
    precision = (1 - beta) / beta + 1 / (1 - before)
    assert math.exp(tables["log_variance"]) == pytest.approx(1 / precision, rel=1e-9)
    assert tables["mean_x_t"] == pytest.approx(math.sqrt(1 - beta) / beta / precision, rel=1e-9)
    assert tables["mean_x0"] == pytest.approx(math.sqrt(before) / (1 - before) / precision, rel=1e-9)


def test_the_posterior_of_the_first_step_is_x0_with_the_next_steps_variance() -> None:
    tables = _tables(1000, 1e-4, 0.02)
    assert float(tables["mean_x0"][0]) == pytest.approx(1.0, rel=1e-12) and float(tables["mean_x_t"][0]) == 0.0
    assert tables["log_variance"][0] == tables["log_variance"][1]


@quick
@given(ts=st.lists(st.integers(0, 999), min_size=1, max_size=6), seed=st.integers(0, 99), learn_sigma=st.booleans())
def test_the_true_noise_gives_back_x0(ts: list[int], seed: int, learn_sigma: bool) -> None:
    process, t = VP(learn_sigma=learn_sigma), torch.tensor(ts)
    x0, noise = batch(len(ts), seed=seed)
    x_t = process.add_noise(x0, noise, t)
    output = torch.cat([noise, torch.full_like(noise, 9.0)], dim=1) if learn_sigma else noise
    assert output.shape[1] == process.output_channels(2)
    found = process.to_x0(output, x_t, t)
    # Rounding of x_t and of the products, of order eps * (|x0| + |noise|), is divided by alpha.
    alpha = process.alpha_sigma(t)[0].view(-1, 1, 1, 1)
    assert ((found - x0).abs() <= 16 * EPS * (1 + noise.abs()) / alpha).all()
    assert found.dtype == torch.float32


@quick
@given(ts=st.lists(st.integers(0, 999), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_the_weighted_error_of_x0_is_the_error_of_the_noise(ts: list[int], seed: int) -> None:
    process, t = VP(), torch.tensor(ts)
    x0, noise = batch(len(ts), seed=seed)
    output = torch.randn(noise.shape, generator=torch.Generator().manual_seed(seed + 1))
    xhat0 = process.to_x0(output, process.add_noise(x0, noise, t), t)
    weighted = process.loss_weight(t) * (x0 - xhat0).square().flatten(1).mean(1)
    # x0 - xhat0 cancels at little noise: sigma (0.01 at least) is what is left of values of order 1.
    torch.testing.assert_close(weighted, (noise - output).square().flatten(1).mean(1), rtol=1e3 * EPS, atol=0)


def test_training_levels_are_uniform_and_rise_with_u() -> None:
    process, u = VP(), (torch.arange(5000, dtype=torch.float64) + 0.5) / 5000
    t = process.sample_t(u)
    assert torch.equal(t, ALL.repeat_interleave(5))
    assert t.dtype == torch.int64 and (process.log_snr(t).diff() <= 0).all()
    ends = torch.tensor([2.0**-33, 1 - 2.0**-33], dtype=torch.float64)
    assert process.sample_t(ends).tolist() == [0, 999]
    assert process.sample_t(ends.float()).tolist() == [0, 999]  # float32 rounds the last one up to 1


def test_the_network_sees_x_t_and_the_step_as_it_is() -> None:
    x_t, _ = batch(3)
    images, time = VP().model_input(x_t, torch.tensor([0, 17, 999]))
    assert images is x_t and time.dtype == torch.float32 and time.tolist() == [0.0, 17.0, 999.0]


def expected_bits(process: VP, x0: Tensor, x_t: Tensor, t: Tensor, eps: Tensor, v: Tensor) -> Tensor:
    """The bound in bits a dimension, from torch.distributions in float64."""
    tables = _tables(1000, 1e-4, 0.02)
    bits = []
    for i, step in enumerate(t.tolist()):
        a, s = math.sqrt(exact_alpha_bar(step)), math.sqrt(1 - exact_alpha_bar(step))
        x, clean = x_t[i].double(), x0[i].double()
        xhat0 = (x - s * eps[i].double()) / a
        c0, ct = float(tables["mean_x0"][step]), float(tables["mean_x_t"][step])
        low, high = float(tables["log_variance"][step]), float(tables["log_beta"][step])
        log_variance = low + (v[i].double() + 1) / 2 * (high - low)
        model = Normal(c0 * xhat0 + ct * x, (log_variance / 2).exp())
        if step > 0:
            nats = kl_divergence(Normal(c0 * clean + ct * x, math.exp(low / 2)), model)
        else:
            edge = torch.tensor(math.inf, dtype=torch.float64)
            upper = torch.where(clean > 0.999, edge, clean + 1 / 255)
            lower = torch.where(clean < -0.999, -edge, clean - 1 / 255)
            standard = Normal(torch.zeros(()).double(), 1.0)
            mass = standard.cdf((upper - model.mean) / model.stddev) - standard.cdf((lower - model.mean) / model.stddev)
            nats = -mass.clamp(min=1e-12).log()
        bits.append(nats.mean() / math.log(2))
    return torch.stack(bits)


@quick
@given(ts=st.lists(st.integers(0, 999), min_size=1, max_size=5), seed=st.integers(0, 999))
def test_the_variance_loss_is_the_variational_bound(ts: list[int], seed: int) -> None:
    process, t = VP(learn_sigma=True), torch.tensor(ts)
    x0, noise = batch(len(ts), seed=seed)
    x0 = ((x0 + 1) * 127.5).round() / 127.5 - 1  # 8-bit values, the ends among them
    x_t = process.add_noise(x0, noise, t)
    generator = torch.Generator().manual_seed(seed + 1)
    eps = noise + 0.3 * torch.randn(noise.shape, generator=generator)
    v = 2 * torch.rand(noise.shape, generator=generator) - 1
    found = process.variance_loss(torch.cat([eps, v], dim=1), x0, x_t, t)
    assert found is not None and found.shape == (len(ts),) and found.dtype == torch.float32
    # In float32: means of order 1 differ by some sigma >= 0.01, and log-variances of order 10.
    torch.testing.assert_close(found.double(), expected_bits(process, x0, x_t, t, eps, v), rtol=2e-4, atol=2e-5)


def test_the_variance_loss_of_the_first_step_is_the_likelihood_of_8_bit_values() -> None:
    process, t = VP(learn_sigma=True), torch.zeros(1, dtype=torch.int64)
    x0 = torch.tensor([-1.0, -129 / 255, 1 / 255, 1.0]).view(1, 1, 2, 2)
    noise = torch.tensor([1.0, -0.5, 0.2, -2.0]).view(1, 1, 2, 2)
    x_t = process.add_noise(x0, noise, t)
    output = torch.cat([noise * 0.5, torch.zeros_like(noise)], dim=1)
    found = process.variance_loss(output, x0, x_t, t)
    expected = expected_bits(process, x0, x_t, t, output[:, :1], output[:, 1:])
    assert found is not None
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)


def test_the_true_posterior_costs_nothing() -> None:
    process, t = VP(learn_sigma=True), torch.arange(1, 1000, 37)
    x0, noise = batch(len(t))
    output = torch.cat([noise, -torch.ones_like(noise)], dim=1)
    loss = process.variance_loss(output, x0, process.add_noise(x0, noise, t), t)
    assert loss is not None
    # Means agree to rounding, which counts in units of the variance (2e-5 at least): (4 eps)^2 / 2e-5, nearly nothing.
    torch.testing.assert_close(loss, torch.zeros(len(t)), rtol=0, atol=1e-6)


def test_the_variance_loss_trains_the_variance_only() -> None:
    process, t = VP(learn_sigma=True), torch.tensor([0, 1, 500, 999])
    x0, noise = batch(4)
    output = torch.cat([1.5 * noise, 0.1 * noise], dim=1).requires_grad_(True)
    loss = process.variance_loss(output, x0, process.add_noise(x0, noise, t), t)
    assert loss is not None
    loss.sum().backward()
    assert output.grad is not None and not output.grad[:, :2].any() and output.grad[:, 2:].all()
    assert output.grad.isfinite().all()


def test_without_a_learned_variance_there_is_no_variance_loss() -> None:
    x0, noise = batch(2)
    assert VP().variance_loss(noise, x0, x0, torch.tensor([3, 4])) is None
    assert VP().output_channels(4) == 4 and VP(learn_sigma=True).output_channels(4) == 8


def test_bf16_outputs_are_taken_in_float32() -> None:
    process, t = VP(), torch.tensor([10, 900])
    x0, noise = batch(2)
    x_t = process.add_noise(x0, noise, t)
    expected = process.to_x0(noise.bfloat16().float(), x_t, t)
    assert torch.equal(process.to_x0(noise.bfloat16(), x_t, t), expected)


def test_the_tables_hold_numbers_also_if_the_planner_asks_first() -> None:
    """The planner counts with tensors that have no numbers, in the same process that trains afterwards."""
    process = VP(num_steps=7)  # nobody else's, so that its tables are not there yet
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("meta"):
        process.alpha_sigma(torch.tensor([3]))
    alpha, _ = process.alpha_sigma(torch.tensor([0]))
    assert alpha.item() == pytest.approx(math.sqrt(1 - 1e-4))


@pytest.mark.parametrize(
    ("schedule", "steps", "first", "last", "count"),
    [
        (1000, "ddim50", [0, 20, 40], [960, 980], 50),  # DDIM's stride, which leaves the end out
        (1000, 250, [0, 4, 8, 12], [995, 999], 250),  # DiT's "250", of stride 999 / 249
        (1000, 21, [0, 50, 100, 150], [949, 999], 21),
        (300, (10, 15, 20), [0, 11, 22, 33], [294, 299], 45),  # improved DDPM's own example
        (1000, 1000, [0, 1, 2], [998, 999], 1000),
        (1000, 1, [999], [999], 1),
        (10, (1, 1, 3), [0, 4, 7], [8, 9], 5),
    ],
    ids=str,
)
def test_a_schedule_is_respaced_as_improved_ddpm_does(
    schedule: int, steps: Steps, first: list[int], last: list[int], count: int
) -> None:
    kept = kept_steps(schedule, steps)
    assert (kept[: len(first)], kept[-len(last) :], len(kept)) == (first, last, count)
    assert kept == sorted(set(kept))


def test_where_a_stride_lands_on_a_half_its_floating_point_sum_decides() -> None:
    """999 / 20 added ten times is a little less than 499.5, and published figures took 499."""
    assert kept_steps(1000, 21)[10] == 499
