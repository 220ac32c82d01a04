"""Samplers on data whose denoiser is known exactly: Gaussians and points."""

import math
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from sadm_fast.config import SamplingConfig
from sadm_fast.diffusion import EDM, VP, Flow, Process, denoise, guided, sample
from sadm_fast.diffusion.process import per_sample
from sadm_fast.diffusion.samplers import SAMPLERS, Denoise, find_sampler, heun_along

MEAN, STD = 0.3, 0.5
PROCESSES: list[Process] = [EDM(sigma_data=STD), Flow(), VP()]
every_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)


def gaussian(process: Process) -> Denoise:
    """E[x0 | x_t] for x0 ~ N(MEAN, STD^2): (alpha STD^2 x_t + sigma^2 MEAN) / (alpha^2 STD^2 + sigma^2)."""

    def call(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (per_sample(c.double(), x) for c in process.alpha_sigma(t))
        return (alpha * STD**2 * x + sigma**2 * MEAN) / (alpha**2 * STD**2 + sigma**2)

    return call


def noise(size: int = 4096) -> Tensor:
    """Quantiles of the standard normal distribution, [size, 1, 1, 1] float64."""
    u = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    return torch.special.ndtri(u).view(-1, 1, 1, 1)


def exact(process: Process, z: Tensor) -> Tensor:
    """The probability flow maps the noise onto the data affinely: quantile to quantile, from the process's start."""
    if isinstance(process, EDM):  # starts as N(0, sigma_max^2), should start as N(MEAN, STD^2 + sigma_max^2)
        start, spread = process.sigma_max * z - MEAN, math.sqrt(STD**2 + process.sigma_max**2)
        return MEAN + STD * start / spread
    if isinstance(process, VP):
        alpha, sigma = (float(c) for c in process.alpha_sigma(torch.tensor([process.num_steps - 1])))
        return MEAN + STD * (z - alpha * MEAN) / math.sqrt(alpha**2 * STD**2 + sigma**2)
    return MEAN + STD * z


@every_process
def test_an_exact_denoiser_of_a_gaussian_gives_its_mean_and_deviation(process: Process) -> None:
    z = noise()
    # Discretisation errors: DDIM, of first order, a few thousandths at 1000 steps; Heun about one at 100.
    steps, limit = (1000, 5e-3) if isinstance(process, VP) else (100, 2e-3)
    images = sample(process, gaussian(process), z, steps)
    assert images.dtype == z.dtype and images.shape == z.shape
    assert float(images.std()) == pytest.approx(STD, rel=limit)
    # EDM starts at mean 0 instead of MEAN, which moves the result by MEAN * STD / 80.
    assert float(images.mean()) == pytest.approx(MEAN, abs=limit * STD + MEAN * STD / 80)
    # Not only the moments: each noise goes where the flow takes it (the outermost quantiles are 3.5 deviations off).
    torch.testing.assert_close(images, exact(process, z), rtol=0, atol=4 * limit * STD)


@every_process
def test_the_error_falls_with_the_order_of_the_method(process: Process) -> None:
    """Heun is of second order (a quarter of the error on halving the step), DDIM of first (a half)."""
    z = noise(64)
    if isinstance(process, VP):
        # What DDIM converges to with 1000 discrete steps; all of them together are the reference.
        target, counts, expected = sample(process, gaussian(process), z, 1000), (25, 50), 2.0
    else:
        target, counts, expected = exact(process, z), (64, 128), 4.0
    errors = [float((sample(process, gaussian(process), z, n) - target).abs().max()) for n in counts]
    assert errors[0] / errors[1] == pytest.approx(expected, rel=0.25)


@every_process
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_distribution_of_one_point_is_returned_exactly(process: Process, steps: int) -> None:
    point = torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    images = sample(process, lambda x, t: point.expand_as(x), start, steps)
    torch.testing.assert_close(images, point.expand(5, 3, 2, 2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 10, 50])
def test_ddim_with_the_true_noise_of_a_point_returns_the_point(steps: int) -> None:
    """Through the network's own parametrisation: for data at one point the noise is (x_t - alpha x0) / sigma."""
    process = VP()
    point = torch.tensor([-1.0, 0.25, 1.0]).view(1, 3, 1, 1)

    class TrueNoise(nn.Module):
        def forward(self, x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
            alpha, sigma = (per_sample(c, x) for c in process.alpha_sigma(time.long()))
            return (x - alpha * point) / sigma

    start = torch.randn(4, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    images = sample(process, guided(process, TrueNoise(), torch.zeros(4, dtype=torch.int64), 1), start, steps)
    # At t = 999 the noise is divided by alpha = 0.0064: float32's rounding grows 160 times, and shrinks afterwards.
    torch.testing.assert_close(images, point.expand(4, 3, 1, 1), rtol=0, atol=4e-4 if steps == 1 else 4e-6)


@pytest.mark.parametrize(("steps", "calls"), [(1, 1), (2, 3), (18, 35)])
@pytest.mark.parametrize("process", [EDM(), Flow()], ids=["EDM", "Flow"])
def test_heun_calls_the_network_twice_a_step_but_once_in_the_last(process: Process, steps: int, calls: int) -> None:
    levels: list[float] = []

    def call(x: Tensor, t: Tensor) -> Tensor:
        levels.append(float(t[0]))
        assert t.shape == (len(x),) and (t == t[0]).all()
        return 0.5 * x

    sample(process, call, torch.randn(2, 1, 2, 2), steps)
    assert len(levels) == calls and min(levels) > 0
    assert levels == sorted(levels, reverse=True)


def test_ddim_visits_evenly_spread_steps_from_last_to_first() -> None:
    visited: list[int] = []

    def call(x: Tensor, t: Tensor) -> Tensor:
        visited.append(int(t[0]))
        return x

    sample(VP(), call, torch.randn(2, 1, 2, 2), 4)
    assert visited == [999, 666, 333, 0]


def test_edm_levels_are_those_of_the_paper() -> None:
    process = EDM(sigma_min=0.002, sigma_max=80.0, rho=7.0)
    levels = process.sampling_levels(18)
    assert levels.dtype == torch.float64 and len(levels) == 18
    for i in range(18):
        root = 80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))
        assert float(levels[i]) == pytest.approx(root**7, rel=1e-12)
    assert process.sampling_levels(1).tolist() == pytest.approx([80.0])


def test_edm_starts_from_noise_of_the_greatest_level() -> None:
    seen: list[Tensor] = []

    def call(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x)
        return torch.zeros_like(x)

    start = torch.randn(3, 1, 2, 2)
    sample(EDM(sigma_max=40.0), call, start, 2)
    torch.testing.assert_close(seen[0], 40.0 * start)


def test_heun_without_a_last_zero_stays_second_order() -> None:
    """dx/dt = x / t * (1 - c) has the solution x ~ t^(1 - c)."""
    c, x = 0.3, torch.ones(1, 1, 1, 1, dtype=torch.float64)
    errors = []
    for steps in (32, 64):
        end = heun_along(lambda x, t: c * x, x, torch.linspace(2, 1, steps + 1, dtype=torch.float64))
        errors.append(abs(float(end) - 0.5 ** (1 - c)))
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.1)


class Recorder(nn.Module):
    """A network whose answer is a known function of image, time and label; remembers its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        self.calls.append((x, time, labels))
        channel = torch.arange(1.0, x.shape[1] + 1).view(1, -1, 1, 1)
        return 0.1 * x + channel * per_sample(labels.float(), x) + 1e-3 * per_sample(time, x)


def start_of(process: Process, size: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(size, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    t = torch.full((size,), 400) if isinstance(process, VP) else torch.full((size,), 0.4)
    return x, t, torch.tensor([0, 2, 5])


@every_process
def test_denoise_is_the_process_around_the_network(process: Process) -> None:
    network = Recorder()
    x, t, labels = start_of(process)
    found = denoise(process, network, x, t, labels)
    images, time = process.model_input(x, t)
    torch.testing.assert_close(found, process.to_x0(network(images, time, labels), x, t), rtol=0, atol=0)
    assert torch.equal(network.calls[0][1], time) and torch.equal(network.calls[0][2], labels)


@every_process
def test_guidance_of_scale_1_is_the_conditional_answer_in_one_call(process: Process) -> None:
    network = Recorder()
    x, t, labels = start_of(process)
    found = guided(process, network, labels, 9, 1.0)(x, t)
    assert len(network.calls) == 1 and len(network.calls[0][0]) == len(x)
    assert torch.equal(network.calls[0][2], labels)
    assert torch.equal(found, denoise(process, Recorder(), x, t, labels))


@every_process
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.5, 4.0])
def test_guidance_extrapolates_every_channel_from_the_null_class(process: Process, scale: float) -> None:
    network = Recorder()
    x, t, labels = start_of(process)
    found = guided(process, network, labels, 9, scale)(x, t)
    assert len(network.calls) == 1 and network.calls[0][2].tolist() == [0, 2, 5, 9, 9, 9]
    conditional = denoise(process, Recorder(), x, t, labels)
    free = denoise(process, Recorder(), x, t, torch.full_like(labels, 9))
    expected = free + scale * (conditional - free)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
    if scale != 0:
        difference = (found - free).abs().amax(dim=(0, 2, 3))
        assert (difference > 0.1).all(), f"some channels are not guided: {difference.tolist()}"


def test_sampling_keeps_no_graph() -> None:
    network = nn.Conv2d(1, 1, 1)
    images = sample(EDM(), lambda x, t: network(x), torch.randn(2, 1, 4, 4), 3)
    assert not images.requires_grad


class Unknown(Process):
    """A process of somebody else's."""

    def sample_t(self, u: Tensor) -> Tensor:
        return u

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return t, t

    def model_input(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return x_t, t

    def to_x0(self, model_output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return x_t

    def loss_weight(self, t: Tensor) -> Tensor:
        return t

    def sampling_levels(self, steps: int) -> Tensor:
        return torch.ones(steps)


def test_a_process_without_a_sampler_is_named() -> None:
    with pytest.raises(ValueError, match="no sampler for Unknown"):
        sample(Unknown(), lambda x, t: x, torch.zeros(1, 1, 1, 1), 2)


def test_a_sampler_that_does_not_fit_is_refused_with_those_that_do() -> None:
    with pytest.raises(ValueError, match="heun: does not fit VP; must be one of auto, ddim"):
        find_sampler("heun", VP())


def test_the_configuration_offers_every_sampler() -> None:
    assert get_args(SamplingConfig.model_fields["sampler"].annotation) == ("auto", *SAMPLERS)


@pytest.mark.parametrize("process", [EDM(sigma_data=STD), Flow()], ids=["EDM", "Flow"])
def test_ddim_follows_the_flow_of_every_process_in_first_order(process: Process) -> None:
    z = noise(64)
    errors = [
        float((sample(process, gaussian(process), z, n, "ddim") - exact(process, z)).abs().max()) for n in (100, 200)
    ]
    assert errors[0] / errors[1] == pytest.approx(2.0, rel=0.25) and errors[1] < 0.05
