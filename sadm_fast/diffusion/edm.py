"""EDM (Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", 2022; Table 1)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sadm_fast.diffusion.process import Process, Steps, count_of, per_sample


@dataclass(frozen=True)
class EDM(Process):
    """t is sigma itself and alpha = 1. In training ln sigma ~ N(p_mean, p_std^2); the network is preconditioned."""

    time_scale: ClassVar[float] = 100.0  # of ln sigma, which lies in [-6, 4.4]

    sigma_data: float = 0.5
    p_mean: float = -1.2
    p_std: float = 1.2
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def sample_t(self, u: Tensor) -> Tensor:
        normal = torch.special.ndtri(u.double())
        return (self.p_mean + self.p_std * normal).exp().float()

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma = t.float()
        return torch.ones_like(sigma), sigma

    def model_input(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma = t.float()
        c_in = (sigma.square() + self.sigma_data**2).rsqrt()
        return per_sample(c_in, x_t) * x_t, self.time_scale * sigma.log()

    def to_x0(self, model_output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return xhat0 = D(x; sigma) = c_skip x + c_out F (eq. 7)."""
        sigma = t.float()
        total = sigma.square() + self.sigma_data**2
        c_skip, c_out = self.sigma_data**2 / total, sigma * self.sigma_data * total.rsqrt()
        return per_sample(c_skip, x_t) * x_t.float() + per_sample(c_out, x_t) * model_output.float()

    def loss_weight(self, t: Tensor) -> Tensor:
        """Return lambda(sigma) = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2."""
        sigma = t.float()
        return (sigma.square() + self.sigma_data**2) / (sigma * self.sigma_data).square()

    def sampling_levels(self, steps: Steps) -> Tensor:
        """Return sigmas from sigma_max to sigma_min, evenly spaced in sigma^(1/rho) (eq. 5): float64 [steps]."""
        fraction = torch.linspace(0, 1, count_of(steps), dtype=torch.float64)
        high, low = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        return (high + fraction * (low - high)) ** self.rho

    def start(self, noise: Tensor, t: Tensor) -> Tensor:
        return noise * t.item()
