"""Samplers: from noise to images, along the probability-flow ODE or the reverse SDE.

A `Denoise` maps x_t [B, C, H, W] and t [B] to xhat0; `guidance.guided` makes one from a network. A sampler walks with
it along `process.sampling_levels(steps)`: `sampler(process, denoise, noise, steps, step_noise, **options)`. Its
keyword-only arguments are its options, named as in config.SamplingConfig. To add one: write the function, name it in
SAMPLERS and in config.SamplingConfig.
"""

import inspect
import math
from collections.abc import Callable

import torch
from torch import Tensor

from sadm_fast.diffusion.edm import EDM
from sadm_fast.diffusion.flow import Flow
from sadm_fast.diffusion.guidance import Denoise
from sadm_fast.diffusion.process import Process, Steps, per_sample
from sadm_fast.diffusion.vp import VP

Sampler = Callable[..., Tensor]
StepNoise = Callable[[int], Tensor]  # the number of a step -> standard normal noise of x's shape


def _at(x: Tensor, level: float | int) -> Tensor:
    """Return the noise level of all samples: [B], int64 for a level of VP."""
    return torch.full((len(x),), level, dtype=torch.int64 if isinstance(level, int) else x.dtype, device=x.device)


def _slope(denoise_fn: Denoise, x: Tensor, t: float) -> Tensor:
    """dx/dt = (x - xhat0) / t, the flow of EDM (x_t = x0 + t eps) and of Flow (x_t = (1 - t) x0 + t eps)."""
    return (x - denoise_fn(x, _at(x, t))) / t


def euler(process: Process, denoise_fn: Denoise, noise: Tensor, steps: Steps, step_noise: StepNoise) -> Tensor:
    """Euler's first-order method for dx/dt = (x - xhat0) / t; a network call a step."""
    levels = process.sampling_levels(steps)
    x = process.start(noise, levels[0])
    for now, then in zip(levels.tolist(), [*levels[1:].tolist(), 0.0], strict=True):
        x = x + (then - now) * _slope(denoise_fn, x, now)
    return x


def heun(
    process: Process,
    denoise_fn: Denoise,
    noise: Tensor,
    steps: Steps,
    step_noise: StepNoise,
    *,
    churn: float = 0.0,
    churn_t_min: float = 0.0,
    churn_t_max: float = math.inf,
    churn_noise: float = 1.0,
) -> Tensor:
    """Heun's second-order method for dx/dt = (x - xhat0) / t; 2 steps - 1 network calls.

    Churn (EDM only; Karras et al. 2022, Algorithm 2: S_churn, S_tmin, S_tmax, S_noise): before a step from t in
    [churn_t_min, churn_t_max], noise of deviation churn_noise brings x to t + gamma t, gamma = churn / steps, at most
    sqrt(2) - 1.
    """
    levels = process.sampling_levels(steps)
    gamma = min(churn / len(levels), math.sqrt(2.0) - 1.0)

    def churned(x: Tensor, step: int, t: float) -> tuple[Tensor, float]:
        if gamma == 0.0 or not churn_t_min <= t <= churn_t_max:
            return x, t
        raised = t + gamma * t
        return x + churn_noise * math.sqrt(raised**2 - t**2) * step_noise(step), raised

    times = torch.cat([levels, levels.new_zeros(1)])
    return heun_along(denoise_fn, process.start(noise, levels[0]), times, churned)


def heun_along(
    denoise_fn: Denoise,
    x: Tensor,
    times: Tensor,
    before_step: Callable[[Tensor, int, float], tuple[Tensor, float]] = lambda x, step, t: (x, t),
) -> Tensor:
    """Take x [B, C, H, W] from times[0] to times[-1] by Heun's method; `times` falls, and may end at 0.

    before_step: x, the number of the step and its t -> the x and t that it starts from.
    """
    for step, (t, then) in enumerate(zip(times[:-1].tolist(), times[1:].tolist(), strict=True)):
        x, now = before_step(x, step, t)
        slope = _slope(denoise_fn, x, now)
        ahead = x + (then - now) * slope
        if then > 0:
            ahead = x + (then - now) * 0.5 * (slope + _slope(denoise_fn, ahead, then))
        x = ahead
    return x


def ddim(
    process: Process, denoise_fn: Denoise, noise: Tensor, steps: Steps, step_noise: StepNoise, *, eta: float = 0.0
) -> Tensor:
    """DDIM (Song et al. 2020, eq. 12): lower the noise level, keep eps or draw part of it anew; a network call a step.

    eta: share of the posterior's deviation, sigma' / sigma sqrt(sigma^2 - (alpha / alpha')^2 sigma'^2), that is drawn.
    With 0 it is the probability flow in first order; with 1, on VP, DDPM with the small variance.
    """
    levels = process.sampling_levels(steps)
    x = process.start(noise, levels[0])
    for i, level in enumerate(levels.tolist()):
        t = torch.full((len(x),), level, dtype=levels.dtype, device=x.device)
        x0 = denoise_fn(x, t)
        if i + 1 == len(levels):
            return x0
        alpha, sigma = process.alpha_sigma(t)
        alpha_then, sigma_then = process.alpha_sigma(torch.full_like(t, levels[i + 1].item()))
        eps = (x - per_sample(alpha, x) * x0) / per_sample(sigma, x)
        drawn = eta * sigma_then / sigma * (sigma.square() - (alpha / alpha_then * sigma_then).square()).sqrt()
        kept = sigma_then if eta == 0.0 else (sigma_then.square() - drawn.square()).sqrt()
        x = per_sample(alpha_then, x) * x0 + per_sample(kept, x) * eps
        if eta != 0.0:
            x = x + per_sample(drawn, x) * step_noise(i)
    return x


def ddpm(
    process: Process,
    denoise_fn: Denoise,
    noise: Tensor,
    steps: Steps,
    step_noise: StepNoise,
    *,
    variance: str = "auto",
) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, Algorithm 2) of the process that visits `steps` of VP's; a call a step.

    variance: "small", the posterior's; "large", beta; "learned", between them by the network's v (Nichol & Dhariwal
    2021, eq. 15); "auto": learned if the network puts v out, else large. The last step adds none.
    """
    assert isinstance(process, VP)
    levels = process.sampling_levels(steps)
    posterior = process.posterior_along(levels)
    x = process.start(noise, levels[0])
    for i, level in enumerate(levels.tolist()):
        x0, v = denoise_fn(x, _at(x, level)).tensor_split([x.shape[1]], dim=1)
        if i + 1 == len(levels):
            return x0
        mean_x0, mean_x_t, small, large = (values[i].item() for values in posterior)
        log_variance: Tensor | float = small if variance == "small" else large
        if variance == "learned" or (variance == "auto" and v.shape[1]):
            fraction = (v + 1.0) / 2.0
            log_variance = fraction * large + (1.0 - fraction) * small
        x = mean_x0 * x0 + mean_x_t * x + (0.5 * torch.as_tensor(log_variance)).exp() * step_noise(i)
    return x


def dpmpp_2m(process: Process, denoise_fn: Denoise, noise: Tensor, steps: Steps, step_noise: StepNoise) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2): second order in log-SNR with a network call a step.

    Of first order are the first step, the last, which ends without noise, and any that is more than twice as long as
    the one before, for which there is too little to extrapolate from: VP's step onto t = 0.
    """
    levels = process.sampling_levels(steps)
    alphas, sigmas = (values.double().tolist() for values in process.alpha_sigma(levels))
    half_log_snr = [math.log(a / s) if a > 0.0 else -math.inf for a, s in zip(alphas, sigmas, strict=True)]
    x = process.start(noise, levels[0])
    before: Tensor | None = None
    for i, level in enumerate(levels.tolist()):
        x0 = denoise_fn(x, _at(x, level))
        if i + 1 == len(levels):
            return x0
        width = half_log_snr[i + 1] - half_log_snr[i]
        target = x0
        if before is not None and width <= 2.0 * (half_log_snr[i] - half_log_snr[i - 1]):
            # Extrapolated to the middle of the step; 0 times the difference after a step from noise alone.
            target = x0 + 0.5 * width / (half_log_snr[i] - half_log_snr[i - 1]) * (x0 - before)
        x = sigmas[i + 1] / sigmas[i] * x - alphas[i + 1] * math.expm1(-width) * target
        before = x0
    return x


def sde(
    process: Process,
    denoise_fn: Denoise,
    noise: Tensor,
    steps: Steps,
    step_noise: StepNoise,
    *,
    sde_noise: float = 1.0,
    sde_last_step: float = 0.04,
) -> Tensor:
    """Euler-Maruyama for the reverse SDE of flow, as SiT (Ma et al. 2024, eq. 6); a network call a step.

        dx = (velocity - w(t) score) dt + sqrt(2 w(t)) dW backwards in t,   w(t) = sde_noise t

    Any w keeps the marginals of x_t; 0 is the probability flow. The steps are even, but the last, of length
    sde_last_step, follows the drift only.
    """
    assert isinstance(process, Flow)
    count = len(process.sampling_levels(steps))
    times = torch.linspace(1.0, sde_last_step if count > 1 else 1.0, count, dtype=torch.float64).tolist()
    x = process.start(noise, torch.ones(()))
    for i, (now, then) in enumerate(zip(times, [*times[1:], 0.0], strict=True)):
        x0 = denoise_fn(x, _at(x, now))
        w, velocity, score = sde_noise * now, (x - x0) / now, ((1.0 - now) * x0 - x) / now**2
        x = x + (then - now) * (velocity - w * score)
        if then > 0.0:
            x = x + math.sqrt(2.0 * w * (now - then)) * step_noise(i)
    return x


# Names in the configuration, with the processes that a sampler fits. "auto" is the first that fits.
SAMPLERS: dict[str, tuple[Sampler, tuple[type[Process], ...]]] = {
    "heun": (heun, (EDM, Flow)),
    "ddim": (ddim, (VP, EDM, Flow)),
    "euler": (euler, (EDM, Flow)),
    "dpmpp_2m": (dpmpp_2m, (VP, EDM, Flow)),
    "ddpm": (ddpm, (VP,)),
    "sde": (sde, (Flow,)),
}


def options_of(sampler: Sampler) -> list[str]:
    """Return the names of a sampler's options, its keyword-only arguments."""
    parameters = inspect.signature(sampler).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]


def sampler_name(name: str, process: Process) -> str:
    """Return the name of the sampler `name`, which for "auto" is the process's own; ValueError if none fits."""
    fitting = [known for known, (_, processes) in SAMPLERS.items() if isinstance(process, processes)]
    if not fitting:
        raise ValueError(f"no sampler for {type(process).__name__}")
    if name != "auto" and name not in fitting:
        raise ValueError(f"{name}: does not fit {type(process).__name__}; must be one of auto, {', '.join(fitting)}")
    return fitting[0] if name == "auto" else name


def find_sampler(name: str, process: Process) -> Sampler:
    """Return the sampler `name`, or the process's own for "auto"; ValueError if there is none that fits."""
    return SAMPLERS[sampler_name(name, process)][0]


def _no_noise(step: int) -> Tensor:
    raise ValueError("this sampler draws noise at its steps: it needs step_noise")


@torch.no_grad()
def sample(
    process: Process,
    denoise_fn: Denoise,
    noise: Tensor,
    steps: Steps,
    sampler: str = "auto",
    step_noise: StepNoise = _no_noise,
    **options: float | str,
) -> Tensor:
    """Draw images [B, C, H, W] from standard normal `noise` [B, C, H, W] in `steps` steps.

    step_noise: the noise that stochastic samplers add; options: `options_of` the sampler.
    """
    chosen, channels = find_sampler(sampler, process), noise.shape[1]
    of_x0: Denoise = denoise_fn if chosen is ddpm else lambda x, t: denoise_fn(x, t)[:, :channels]
    return chosen(process, of_x0, noise, steps, step_noise, **options)
