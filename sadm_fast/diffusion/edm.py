"""EDM (Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", 2022; Table 1)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sadm_fast.diffusion.process import Process, per_sample

# DiT's sinusoidal embedding resolves integers from 0 to 999; ln sigma in [-6, 4.4] is stretched to a like range.
_TIME_SCALE = 100.0


@dataclass(frozen=True)
class EDM(Process):
    """t is sigma itself, alpha = 1; ln sigma ~ N(p_mean, p_std^2) in training; preconditioned network."""

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
        return per_sample(c_in, x_t) * x_t, _TIME_SCALE * sigma.log()

    def to_x0(self, model_output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """D(x; sigma) = c_skip x + c_out F (eq. 7)."""
        sigma = t.float()
        total = sigma.square() + self.sigma_data**2
        c_skip, c_out = self.sigma_data**2 / total, sigma * self.sigma_data * total.rsqrt()
        return per_sample(c_skip, x_t) * x_t.float() + per_sample(c_out, x_t) * model_output.float()

    def loss_weight(self, t: Tensor) -> Tensor:
        """lambda(sigma) = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2."""
        sigma = t.float()
        return (sigma.square() + self.sigma_data**2) / (sigma * self.sigma_data).square()
