"""Deterministic samplers: from noise to images along the probability-flow ODE.

A `Denoise` maps (x_t, t) to xhat0; `guided` makes one from a network. EDM and flow share Heun's method, because both
have dx/dt = (x - xhat0) / t (EDM: x = x0 + t eps; flow: x = (1 - t) x0 + t eps). VP uses DDIM.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sadm_fast.diffusion.edm import EDM
from sadm_fast.diffusion.flow import Flow
from sadm_fast.diffusion.process import Process, per_sample
from sadm_fast.diffusion.vp import VP

Denoise = Callable[[Tensor, Tensor], Tensor]


def denoise(process: Process, model: nn.Module, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """xhat0 [B, C, H, W] of the network `model(x, time, labels)` at noise levels t [B]."""
    x_in, time = process.model_input(x_t, t)
    return process.to_x0(model(x_in, time, labels), x_t, t)


def guided(process: Process, model: nn.Module, labels: Tensor, null_class: int, guidance_scale: float = 1.0) -> Denoise:
    """Classifier-free guidance (Ho & Salimans 2022) on all channels: x0_null + scale (x0_label - x0_null).

    Scale 1 calls the network once a step; any other scale twice (as one batch of 2B).
    """
    if guidance_scale == 1.0:
        return lambda x, t: denoise(process, model, x, t, labels)
    both = torch.cat([labels, torch.full_like(labels, null_class)])

    def call(x: Tensor, t: Tensor) -> Tensor:
        conditional, free = denoise(process, model, x.repeat(2, 1, 1, 1), t.repeat(2), both).chunk(2)
        return free + guidance_scale * (conditional - free)

    return call


def edm_times(process: EDM, steps: int) -> Tensor:
    """Noise levels from sigma_max to sigma_min, then 0 (Karras et al. 2022, eq. 5): float64 [steps + 1]."""
    fraction = torch.linspace(0, 1, steps, dtype=torch.float64) if steps > 1 else torch.zeros(1, dtype=torch.float64)
    high, low = process.sigma_max ** (1 / process.rho), process.sigma_min ** (1 / process.rho)
    return torch.cat([(high + fraction * (low - high)) ** process.rho, torch.zeros(1, dtype=torch.float64)])


def heun(denoise_fn: Denoise, x: Tensor, times: Tensor) -> Tensor:
    """Heun's second-order method along falling `times` [N + 1], last one 0; 2N - 1 network calls."""
    for now, then in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        slope = (x - denoise_fn(x, x.new_full((len(x),), now))) / now
        ahead = x + (then - now) * slope
        if then > 0:
            slope_ahead = (ahead - denoise_fn(ahead, x.new_full((len(x),), then))) / then
            ahead = x + (then - now) * 0.5 * (slope + slope_ahead)
        x = ahead
    return x


def ddim(process: VP, denoise_fn: Denoise, x: Tensor, steps: int) -> Tensor:
    """DDIM with eta = 0 (Song et al. 2020, eq. 12) over `steps` timesteps evenly spread over the process."""
    times = torch.linspace(process.num_steps - 1, 0, steps, dtype=torch.float64).round().long()
    for i, now in enumerate(times.tolist()):
        t = torch.full((len(x),), now, device=x.device)
        x0 = denoise_fn(x, t)
        if i + 1 == len(times):
            return x0
        alpha, sigma = process.alpha_sigma(t)
        alpha_then, sigma_then = process.alpha_sigma(torch.full_like(t, int(times[i + 1])))
        eps = (x - per_sample(alpha, x) * x0) / per_sample(sigma, x)
        x = per_sample(alpha_then, x) * x0 + per_sample(sigma_then, x) * eps
    return x


@torch.no_grad()
def sample(process: Process, denoise_fn: Denoise, noise: Tensor, steps: int) -> Tensor:
    """Images [B, C, H, W] from standard normal `noise`, with the process's own sampler (Heun or DDIM)."""
    if isinstance(process, EDM):
        times = edm_times(process, steps)
        return heun(denoise_fn, noise * times[0].item(), times)
    if isinstance(process, Flow):
        return heun(denoise_fn, noise, torch.linspace(1, 0, steps + 1, dtype=torch.float64))
    if isinstance(process, VP):
        return ddim(process, denoise_fn, noise, steps)
    raise TypeError(f"no sampler for {type(process).__name__}")
