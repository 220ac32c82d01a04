"""Variance-preserving process: DDPM (Ho et al. 2020) as used by DiT, with the learned variance of improved DDPM."""

import math
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, repeat
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from sadm_fast.diffusion.process import Process, Steps, per_sample


class Posterior(NamedTuple):
    """q(x_before | x_t, x0) = N(mean_x0 x0 + mean_x_t x_t, variance) (Ho et al., eq. 6-7): float64 [n], a value a t."""

    mean_x0: Tensor
    mean_x_t: Tensor
    log_variance: Tensor  # the lower bound of a learned variance; at the first t, where it is 0, that of the second
    log_beta: Tensor  # the upper one


def _posterior(betas: Tensor, bar: Tensor) -> Posterior:
    """Tabulate the posterior of a schedule of rising t: betas [n], bar = cumprod(1 - betas) = alpha^2 [n]."""
    bar_before = torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])
    variance = betas * (1.0 - bar_before) / (1.0 - bar)
    return Posterior(
        mean_x0=betas * bar_before.sqrt() / (1.0 - bar),
        mean_x_t=(1.0 - bar_before) * (1.0 - betas).sqrt() / (1.0 - bar),
        log_variance=torch.cat([variance[1:2] if len(variance) > 1 else betas, variance[1:]]).log(),
        log_beta=betas.log(),
    )


@cache
def _tables(num_steps: int, beta_start: float, beta_end: float) -> dict[str, Tensor]:
    """Tabulate alpha_t, sigma_t and the posterior: float64 [num_steps] each."""
    with unset_fake_temporarily(), torch.device("cpu"):  # numbers, whatever the first caller counts with
        betas = torch.linspace(beta_start, beta_end, num_steps, dtype=torch.float64)
        bar = torch.cumprod(1.0 - betas, dim=0)
        return {"alpha": bar.sqrt(), "sigma": (1.0 - bar).sqrt(), "bar": bar, **_posterior(betas, bar)._asdict()}


def kept_steps(num_steps: int, steps: Steps) -> list[int]:
    """Choose from a schedule's steps 0 .. num_steps - 1 as improved DDPM does (Nichol & Dhariwal 2021); rising.

    steps: a number, evenly spread from the first to the last; a number for each of several sections of equal length,
    as a tuple; or "ddimN", every k-th from 0, with the smallest k that gives N. One step alone is the last.

    Raises ValueError if there are too few steps, or no k.
    """
    if isinstance(steps, str):
        asked = int(steps.removeprefix("ddim"))
        for stride in range(1, num_steps):
            if len(range(0, num_steps, stride)) == asked:
                return list(range(0, num_steps, stride))
        raise ValueError(f"{steps}: no whole stride takes {asked} of {num_steps} steps")
    if isinstance(steps, int):
        if steps == 1:
            return [num_steps - 1]
        steps = (steps,)
    kept: list[int] = []
    start = 0
    for i, count in enumerate(steps):
        size = num_steps // len(steps) + (i < num_steps % len(steps))
        if count > size:
            what = "the schedule has" if len(steps) == 1 else f"section {i + 1} of {len(steps)} has"
            raise ValueError(f"{count}: {what} {size} steps")
        # Strides are added up in floating point: where one lands on a half, its rounding decides, there as here.
        step = (size - 1) / max(1, count - 1)
        places = accumulate(repeat(step, count - 1), initial=0.0)
        kept += [start + round(place) for place in places]
        start += size
    return kept


@dataclass(frozen=True)
class VP(Process):
    """t is an integer, 0 to num_steps-1, with linear betas; the network predicts eps.

    With `learn_sigma` it predicts a variance too: the output has 2C channels, [eps | v], and v in [-1, 1] interpolates
    log sigma^2 between the posterior variance and beta (Nichol & Dhariwal 2021, eq. 15).
    """

    num_steps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    learn_sigma: bool = False

    def _at(self, name: str, t: Tensor) -> Tensor:
        table = _tables(self.num_steps, self.beta_start, self.beta_end)[name].to(t.device)
        return table[t.long()].float()

    def output_channels(self, channels: int) -> int:
        return 2 * channels if self.learn_sigma else channels

    def sample_t(self, u: Tensor) -> Tensor:
        return (u.double() * self.num_steps).long().clamp(max=self.num_steps - 1)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self._at("alpha", t), self._at("sigma", t)

    def model_input(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return x_t, t.float()

    def to_x0(self, model_output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return xhat0 = (x_t - sigma eps) / alpha."""
        eps = model_output[:, : x_t.shape[1]].float()
        alpha, sigma = self.alpha_sigma(t)
        return (x_t.float() - per_sample(sigma, x_t) * eps) / per_sample(alpha, x_t)

    def loss_weight(self, t: Tensor) -> Tensor:
        """Return alpha^2 / sigma^2: ||x0 - xhat0||^2 = (sigma/alpha)^2 ||eps - epshat||^2, which is DDPM's loss."""
        alpha, sigma = self.alpha_sigma(t)
        return (alpha / sigma).square()

    def sampling_levels(self, steps: Steps) -> Tensor:
        """Return the kept steps (`kept_steps`), from the last to the first: int64."""
        return torch.tensor(kept_steps(self.num_steps, steps)[::-1])

    def posterior_along(self, levels: Tensor) -> Posterior:
        """Tabulate the posterior of a process that visits only `levels` [n], falling, in their order."""
        bar = _tables(self.num_steps, self.beta_start, self.beta_end)["bar"][levels.flip(0)]
        betas = 1.0 - bar / torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])
        return Posterior(*(values.flip(0) for values in _posterior(betas, bar)))

    def variance_loss(self, model_output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor | None:
        """Compute the variational bound, in bits a dimension [B], with the mean detached: it trains v only.

        KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)) for t > 0, and -log p(x0 | x_1) of 8-bit values in [-1, 1] at 0.
        """
        if not self.learn_sigma:
            return None
        v = model_output[:, x_t.shape[1] :].float()
        xhat0 = self.to_x0(model_output.detach(), x_t, t)

        def at(name: str) -> Tensor:
            return per_sample(self._at(name, t), x_t)

        true_mean = at("mean_x0") * x0 + at("mean_x_t") * x_t
        mean = at("mean_x0") * xhat0 + at("mean_x_t") * x_t
        true_log_variance, fraction = at("log_variance"), (v + 1.0) / 2.0
        log_variance = fraction * at("log_beta") + (1.0 - fraction) * true_log_variance

        kl = 0.5 * (
            log_variance
            - true_log_variance
            - 1.0
            + (true_log_variance - log_variance).exp()
            + (true_mean - mean).square() * (-log_variance).exp()
        )
        nll = -_log_prob_8bit(x0, mean, 0.5 * log_variance)
        bits = torch.where(per_sample(t == 0, x_t), nll, kl) / math.log(2.0)
        return bits.flatten(1).mean(dim=1)


def _log_prob_8bit(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Return the log of the mass that N(mean, scale^2) puts on x's 8-bit bin; x in [-1, 1], the end bins are open."""
    z, half = (x - mean), 1.0 / 255.0
    scale = (-log_scale).exp()
    upper = torch.special.ndtr(scale * (z + half))
    lower = torch.special.ndtr(scale * (z - half))
    mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1.0 - lower, upper - lower))
    return mass.clamp(min=1e-12).log()
