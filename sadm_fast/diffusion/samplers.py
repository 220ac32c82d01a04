"""Deterministic samplers: from noise to images along the probability-flow ODE.

A `Denoise` maps x_t [B, C, H, W] and t [B] to xhat0; `guided` makes one from a network. A `Sampler` walks with it along
`process.sampling_levels(steps)`. To add one: write the function, name it in SAMPLERS and in config.SamplingConfig.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sadm_fast.diffusion.edm import EDM
from sadm_fast.diffusion.flow import Flow
from sadm_fast.diffusion.process import Process, per_sample
from sadm_fast.diffusion.vp import VP

Denoise = Callable[[Tensor, Tensor], Tensor]
Sampler = Callable[[Process, Denoise, Tensor, int], Tensor]  # (process, denoise, noise, steps) -> images


def denoise(process: Process, model: nn.Module, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """Compute xhat0 [B, C, H, W] by the network `model(x, time, labels)` at noise levels t [B]."""
    x_in, time = process.model_input(x_t, t)
    return process.to_x0(model(x_in, time, labels), x_t, t)


def guided(process: Process, model: nn.Module, labels: Tensor, null_class: int, guidance_scale: float = 1.0) -> Denoise:
    """Guide on all channels: xhat0 = x0_null + scale (x0_label - x0_null); classifier-free, Ho & Salimans 2022.

    Scale 1 calls the network once a step with B samples, any other scale once with 2B.
    """
    if guidance_scale == 1.0:
        return lambda x, t: denoise(process, model, x, t, labels)
    both = torch.cat([labels, torch.full_like(labels, null_class)])

    def call(x: Tensor, t: Tensor) -> Tensor:
        conditional, free = denoise(process, model, x.repeat(2, 1, 1, 1), t.repeat(2), both).chunk(2)
        return free + guidance_scale * (conditional - free)

    return call


def heun(process: Process, denoise_fn: Denoise, noise: Tensor, steps: int) -> Tensor:
    """Heun's second-order method for dx/dt = (x - xhat0) / t; 2 steps - 1 network calls.

    EDM (x = x0 + t eps) and flow (x = (1 - t) x0 + t eps) both have this ODE; VP's levels are no times of it.
    """
    levels = process.sampling_levels(steps)
    return heun_along(denoise_fn, process.start(noise, levels[0]), torch.cat([levels, levels.new_zeros(1)]))


def heun_along(denoise_fn: Denoise, x: Tensor, times: Tensor) -> Tensor:
    """Take x [B, C, H, W] from times[0] to times[-1] by Heun's method; `times` falls, and may end at 0."""
    for now, then in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        slope = (x - denoise_fn(x, x.new_full((len(x),), now))) / now
        ahead = x + (then - now) * slope
        if then > 0:
            slope_ahead = (ahead - denoise_fn(ahead, x.new_full((len(x),), then))) / then
            ahead = x + (then - now) * 0.5 * (slope + slope_ahead)
        x = ahead
    return x


def ddim(process: Process, denoise_fn: Denoise, noise: Tensor, steps: int) -> Tensor:
    """DDIM with eta = 0 (Song et al. 2020, eq. 12): keep eps, lower the noise level; first order, `steps` calls."""
    levels = process.sampling_levels(steps)
    x = process.start(noise, levels[0])
    for i, level in enumerate(levels.tolist()):
        t = torch.full((len(x),), level, dtype=levels.dtype, device=x.device)
        x0 = denoise_fn(x, t)
        if i + 1 == steps:
            return x0
        alpha, sigma = process.alpha_sigma(t)
        alpha_then, sigma_then = process.alpha_sigma(torch.full_like(t, levels[i + 1].item()))
        eps = (x - per_sample(alpha, x) * x0) / per_sample(sigma, x)
        x = per_sample(alpha_then, x) * x0 + per_sample(sigma_then, x) * eps
    return x


# Names in the configuration, with the processes that a sampler fits. "auto" is the first that fits.
SAMPLERS: dict[str, tuple[Sampler, tuple[type[Process], ...]]] = {
    "heun": (heun, (EDM, Flow)),
    "ddim": (ddim, (VP, EDM, Flow)),
}


def find_sampler(name: str, process: Process) -> Sampler:
    """Return the sampler `name`, or the process's own for "auto"; ValueError if there is none that fits."""
    fitting = {known: sampler for known, (sampler, processes) in SAMPLERS.items() if isinstance(process, processes)}
    if not fitting:
        raise ValueError(f"no sampler for {type(process).__name__}")
    if name != "auto" and name not in fitting:
        raise ValueError(f"{name}: does not fit {type(process).__name__}; must be one of auto, {', '.join(fitting)}")
    return next(iter(fitting.values())) if name == "auto" else fitting[name]


@torch.no_grad()
def sample(process: Process, denoise_fn: Denoise, noise: Tensor, steps: int, sampler: str = "auto") -> Tensor:
    """Draw images [B, C, H, W] from standard normal `noise` [B, C, H, W] in `steps` steps."""
    return find_sampler(sampler, process)(process, denoise_fn, noise, steps)
