"""Samplers on data whose denoiser is known exactly: Gaussians and points."""

import math
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from sadm_fast.config_sampling import SamplingConfig
from sadm_fast.diffusion import EDM, VP, Flow, Process, guided, sample
from sadm_fast.diffusion.guidance import Denoise
from sadm_fast.diffusion.process import Steps, per_sample
from sadm_fast.diffusion.samplers import SAMPLERS, find_sampler, heun_along, options_of

MEAN, STD = 0.3, 0.5
PROCESSES: list[Process] = [EDM(sigma_data=STD), Flow(), VP()]
every_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)


def gaussian(process: Process, mean: float = MEAN, std: float = STD) -> Denoise:
    """E[x0 | x_t] for x0 ~ N(mean, std^2): (alpha std^2 x_t + sigma^2 mean) / (alpha^2 std^2 + sigma^2)."""

    def call(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (per_sample(c.double(), x) for c in process.alpha_sigma(t))
        return (alpha * std**2 * x + sigma**2 * mean) / (alpha**2 * std**2 + sigma**2)

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

    def sampling_levels(self, steps: Steps) -> Tensor:
        return torch.ones(3)


def test_a_process_without_a_sampler_is_named() -> None:
    with pytest.raises(ValueError, match="no sampler for Unknown"):
        sample(Unknown(), lambda x, t: x, torch.zeros(1, 1, 1, 1), 2)


def test_a_sampler_that_does_not_fit_is_refused_with_those_that_do() -> None:
    with pytest.raises(ValueError, match="heun: does not fit VP; must be one of auto, ddim, dpmpp_2m, ddpm"):
        find_sampler("heun", VP())


def test_the_configuration_offers_every_sampler_and_its_options_with_their_defaults() -> None:
    assert get_args(SamplingConfig.model_fields["sampler"].annotation) == ("auto", *SAMPLERS)
    for name, (sampler, _) in SAMPLERS.items():
        assert list(SamplingConfig().options(name)) == options_of(sampler)
        process = next(p for p in PROCESSES if isinstance(p, SAMPLERS[name][1]))
        x = torch.ones(1, 1, 1, 1)
        drawn = [
            sample(process, gaussian(process), x, 5, name, lambda _: torch.ones(1, 1, 1, 1), **options)
            for options in ({}, SamplingConfig().options(name))
        ]
        assert torch.equal(*drawn)


@pytest.mark.parametrize("process", [EDM(sigma_data=STD), Flow()], ids=["EDM", "Flow"])
def test_ddim_follows_the_flow_of_every_process_in_first_order(process: Process) -> None:
    z = noise(64)
    errors = [
        float((sample(process, gaussian(process), z, n, "ddim") - exact(process, z)).abs().max()) for n in (100, 200)
    ]
    assert errors[0] / errors[1] == pytest.approx(2.0, rel=0.25) and errors[1] < 0.05


def moments(
    process: Process, denoise_fn: Denoise, steps: Steps, sampler: str, **options: float | str
) -> tuple[float, float]:
    """Mean and deviation of a sampler's images, exactly, where denoise_fn is affine: no image is drawn.

    The image is then affine in the starting noise and in each step's. Sample 0 gets none, sample 1 the starting noise
    1, sample 2 + i the noise 1 at step i: the squares of their differences from sample 0 add up to the variance.
    """
    count = len(process.sampling_levels(steps))
    unit = torch.eye(count + 2, dtype=torch.float64).view(count + 2, count + 2, 1, 1, 1)
    images = sample(process, denoise_fn, unit[1], steps, sampler, lambda i: unit[2 + i], **options).flatten()
    return float(images[0]), float((images - images[0]).square().sum().sqrt())


def with_true_variance(process: VP, steps: Steps) -> Denoise:
    """The ideal network of a Gaussian: [xhat0 | v], v of the variance of x_before given x_t."""
    levels = process.sampling_levels(steps)
    posterior = process.posterior_along(levels)

    def call(x: Tensor, t: Tensor) -> Tensor:
        x0, place = gaussian(process)(x, t), levels.tolist().index(int(t[0]))
        alpha, sigma = (float(c[0].double()) for c in process.alpha_sigma(t))
        of_x0 = STD**2 * sigma**2 / (alpha**2 * STD**2 + sigma**2)
        mean_x0, _, small, large = (float(values[place]) for values in posterior)
        true = math.exp(small) + mean_x0**2 * of_x0
        return torch.cat([x0, torch.full_like(x, 2 * (math.log(true) - small) / (large - small) - 1)], dim=1)

    return call


@pytest.mark.parametrize("steps", [7, 50, 250, 1000, "ddim50", (10, 15, 20)], ids=str)
def test_ddpm_with_the_true_variance_has_the_marginals_of_the_data_at_any_respacing(steps: Steps) -> None:
    process = VP(learn_sigma=True)
    mean, std = moments(process, with_true_variance(process, steps), steps, "ddpm")
    # It starts from N(0, 1), not from the last level's own N(alpha MEAN, ...); it ends with E[x0 | x] at the first.
    alpha, sigma = (c.double().item() for c in process.alpha_sigma(process.sampling_levels(steps)[-1:]))
    shrinks = alpha * STD / math.sqrt(alpha**2 * STD**2 + sigma**2)
    far = process.alpha_sigma(process.sampling_levels(steps)[:1])[0].item()
    assert mean == pytest.approx(MEAN, abs=far * MEAN + 1e-6)
    assert std == pytest.approx(STD * shrinks, rel=far + 1e-5)


@pytest.mark.parametrize("steps", [5, 250])
def test_the_fixed_variances_of_ddpm_are_right_for_noise_and_for_a_point(steps: int) -> None:
    """Ho et al. 2020, section 3.2: beta for x0 ~ N(0, 1), the posterior's for x0 at one point."""
    process = VP()
    alpha = process.alpha_sigma(torch.tensor([0]))[0].item()
    assert moments(process, gaussian(process, 0.0, 1.0), steps, "ddpm")[1] == pytest.approx(alpha, rel=1e-6)
    small = moments(process, gaussian(process, 0.0, 1.0), steps, "ddpm", variance="small")[1]
    assert small < alpha * (1 - 1e-3)
    # Of a point every x_t on the way is alpha point + sigma noise.
    levels = process.sampling_levels(steps)
    seen: list[Tensor] = []

    def point(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x)
        return torch.full_like(x, MEAN)

    moments(process, point, steps, "ddpm", variance="small")
    for x, level in zip(seen, levels, strict=True):
        alpha, sigma = (c.double().item() for c in process.alpha_sigma(level[None]))
        found = (x - x[0]).square().sum().sqrt().item()
        assert found == pytest.approx(sigma, rel=1e-4)  # at the start it is 1, and 1 - sigma = 2e-5


def test_ddim_with_eta_1_is_ddpm_with_the_small_variance() -> None:
    process, start = VP(), noise(16)
    fresh = torch.randn(50, *start.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for steps in ("ddim50", 20):
        drawn = [
            sample(process, gaussian(process), start, steps, name, lambda i: fresh[i], **options)
            for name, options in (("ddim", {"eta": 1.0}), ("ddpm", {"variance": "small"}))
        ]
        # alpha and sigma are float32, and sigma^2 - (alpha / alpha')^2 sigma'^2 loses three digits of them.
        torch.testing.assert_close(drawn[0], drawn[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("eta", [0.3, 1.0])
@every_process
def test_ddim_keeps_the_marginals_whatever_is_drawn_anew(process: Process, eta: float) -> None:
    steps = (250, 500)
    errors = [abs(moments(process, gaussian(process), n, "ddim", eta=eta)[1] - STD) for n in steps]
    assert errors[1] < 0.02 * STD and errors[1] < 0.7 * errors[0]  # first order


@pytest.mark.parametrize("churn", [5.0, 40.0])
def test_heun_with_churn_keeps_the_marginals_in_second_order(churn: float) -> None:
    process = EDM(sigma_data=STD)

    def found(steps: int, **options: float) -> tuple[float, float]:
        return moments(process, gaussian(process), steps, "heun", churn=churn, **options)

    # EDM starts at mean 0 instead of MEAN; churn forgets some of it.
    assert found(100)[0] == pytest.approx(MEAN, abs=MEAN * STD / 80 + 1e-3)
    errors = [abs(found(steps)[1] - STD) for steps in (200, 400)]
    assert errors[1] < 1e-3 * STD and errors[0] / errors[1] == pytest.approx(4.0, rel=0.25)
    assert found(100, churn_t_min=90.0) == moments(process, gaussian(process), 100, "heun")
    assert found(100, churn_noise=1.01)[1] > found(100)[1]


def test_churn_raises_the_level_by_gamma_at_most_root_2_and_only_inside_its_interval() -> None:
    process, seen = EDM(), []

    def call(x: Tensor, t: Tensor) -> Tensor:
        seen.append(float(t[0]))
        return 0.5 * x

    def visited(**options: float) -> list[float]:
        """The level that each step starts from."""
        seen.clear()
        x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        sample(process, call, x, 10, "heun", lambda _: torch.ones_like(x), **options)
        return seen[::2]

    levels = process.sampling_levels(10).tolist()
    assert visited(churn=2.0) == pytest.approx([1.2 * t for t in levels], rel=1e-9)
    assert visited(churn=1e6) == pytest.approx([math.sqrt(2) * t for t in levels], rel=1e-9)
    inside = [1.2 * t if 0.1 <= t <= 10 else t for t in levels]
    assert visited(churn=2.0, churn_t_min=0.1, churn_t_max=10.0) == pytest.approx(inside, rel=1e-9)


@pytest.mark.parametrize("process", [EDM(sigma_data=STD), Flow()], ids=["EDM", "Flow"])
def test_dpmpp_2m_is_of_second_order_with_a_call_a_step(process: Process) -> None:
    z, calls = noise(64), []

    def call(x: Tensor, t: Tensor) -> Tensor:
        calls.append(t)
        return gaussian(process)(x, t)

    errors = [float((sample(process, call, z, n, "dpmpp_2m") - exact(process, z)).abs().max()) for n in (64, 128)]
    assert len(calls) == 64 + 128
    # The last step, of first order, is from sigma_min of EDM, 1/n of flow: not the term that counts.
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.3)


def test_dpmpp_2m_needs_a_fraction_of_ddims_steps_on_vp() -> None:
    process, z = VP(), noise(64)
    target = sample(process, gaussian(process), z, 1000, "ddim")
    ddim, dpmpp = (
        float((sample(process, gaussian(process), z, 20, name) - target).abs().max()) for name in ("ddim", "dpmpp_2m")
    )
    assert dpmpp < ddim / 3


@pytest.mark.parametrize("process", [EDM(sigma_data=STD), Flow()], ids=["EDM", "Flow"])
def test_euler_is_ddim(process: Process) -> None:
    z = noise(64)
    drawn = [sample(process, gaussian(process), z, 20, name) for name in ("euler", "ddim")]
    # ddim takes alpha and sigma in float32; its first eps, of EDM, is of images 80 times as large.
    torch.testing.assert_close(drawn[0], drawn[1], rtol=0, atol=80 * 4 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("sde_noise", [0.0, 1.0, 3.0])
def test_the_sde_of_flow_keeps_the_marginals_whatever_its_noise(sde_noise: float) -> None:
    process = Flow()
    found = [
        moments(process, gaussian(process), n, "sde", sde_noise=sde_noise, sde_last_step=1 / n) for n in (200, 400)
    ]
    errors = [abs(mean - MEAN) + abs(std - STD) for mean, std in found]
    assert errors[1] < 0.02 and errors[0] / errors[1] == pytest.approx(2.0, rel=0.25)  # Euler-Maruyama: weak order 1


def test_the_last_step_of_the_sde_adds_no_noise_and_is_as_long_as_asked() -> None:
    asked: list[int] = []
    times: list[float] = []

    def call(x: Tensor, t: Tensor) -> Tensor:
        times.append(float(t[0]))
        return x

    def fresh(step: int) -> Tensor:
        asked.append(step)
        return torch.zeros(1, 1, 1, 1, dtype=torch.float64)

    sample(Flow(), call, torch.ones(1, 1, 1, 1, dtype=torch.float64), 5, "sde", fresh)
    assert asked == [0, 1, 2, 3] and times == pytest.approx([1.0, 0.76, 0.52, 0.28, 0.04])


@pytest.mark.parametrize(("process", "name"), [(VP(), "ddpm"), (Flow(), "sde")], ids=["ddpm", "sde"])
def test_a_stochastic_sampler_asks_for_its_noise(process: Process, name: str) -> None:
    with pytest.raises(ValueError, match="needs step_noise"):
        sample(process, gaussian(process), noise(2), 3, name)
