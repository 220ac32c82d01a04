"""Rectified flow (Liu et al. 2022; Lipman et al. 2022): straight lines between noise and data."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sadm_fast.diffusion.process import Process, Steps, count_of, per_sample


@dataclass(frozen=True)
class Flow(Process):
    """x_t = (1 - t) x0 + t eps with t in (0, 1); the network is given 1000 t and predicts the velocity eps - x0.

    With `to_data` it is given 1 - t and predicts x0 - eps, as SiT (Ma et al. 2024), whose time runs to the data.

    In training t is logit-normal (Esser et al. 2024) with mean `t_mean` and deviation `t_std`, or uniform if `t_std` is
    0.
    """

    time_scale: ClassVar[float] = 1000.0

    t_mean: float = 0.0
    t_std: float = 0.0
    to_data: bool = False

    def sample_t(self, u: Tensor) -> Tensor:
        u = u.double()
        t = u if self.t_std == 0 else torch.sigmoid(self.t_mean + self.t_std * torch.special.ndtri(u))
        # At exactly 0 the weight 1/t^2 and at exactly 1 the log-SNR would be infinite.
        return t.float().clamp(1e-4, 1.0 - 1e-4)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.float()
        return 1.0 - t, t

    def model_input(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return x_t, 1.0 - t.float() if self.to_data else self.time_scale * t.float()

    def to_x0(self, model_output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        step = per_sample(t.float(), x_t) * model_output.float()
        return x_t.float() + step if self.to_data else x_t.float() - step

    def loss_weight(self, t: Tensor) -> Tensor:
        """Return 1 / t^2: ||x0 - xhat0||^2 = t^2 ||v - vhat||^2, so the weighted error is the error of the velocity."""
        return t.float().reciprocal().square()

    def sampling_levels(self, steps: Steps) -> Tensor:
        """Return t from 1, evenly spaced: float64 [steps]."""
        return torch.linspace(1, 0, count_of(steps) + 1, dtype=torch.float64)[:-1]
