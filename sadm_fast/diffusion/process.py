"""The interface of a diffusion process: adding noise, the network's input, xhat0 from its output, the loss weight.

    x_t = alpha(t) x0 + sigma(t) eps,   lambda(t) = log(alpha^2 / sigma^2)
    L_den = mean_i w(t_i) ||x0_i - xhat0_i||^2,   the norm being the mean over pixels and channels

Images are float tensors [B, C, H, W]; t is [B]; alpha, sigma, weights come back as float32 [B].
"""

from abc import ABC, abstractmethod
from typing import ClassVar, TypeAlias

from torch import Tensor

# A sampler's steps: their number, or, of a discrete schedule, a choice of its steps (VP.sampling_levels).
Steps: TypeAlias = int | str | tuple[int, ...]


def per_sample(value: Tensor, like: Tensor) -> Tensor:
    """Reshape `value` [B] to [B, 1, 1, ...], so that it multiplies `like` [B, ...] sample by sample."""
    return value.reshape(-1, *([1] * (like.dim() - 1)))


class Process(ABC):
    """A forward process and what its network predicts. No state: every method is a pure function of tensors."""

    # Factor on the natural time in `model_input`: sinusoidal embeddings are made for the integers 0..999.
    time_scale: ClassVar[float] = 1.0

    def output_channels(self, channels: int) -> int:
        """Return how many channels the network has to put out for images of `channels` channels."""
        return channels

    @abstractmethod
    def sample_t(self, u: Tensor) -> Tensor:
        """Draw training noise levels t [B]: the inverse distribution function at uniform numbers u [B] in (0, 1)."""

    @abstractmethod
    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha(t) and sigma(t), float32 [B] each."""

    @abstractmethod
    def model_input(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the network's input: the scaled x_t [B, C, H, W] and its time argument, float32 [B]."""

    @abstractmethod
    def to_x0(self, model_output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Compute xhat0, float32 [B, C, H, W], from the network's output [B, output_channels, H, W]."""

    @abstractmethod
    def loss_weight(self, t: Tensor) -> Tensor:
        """Return w(t) [B], chosen so that w ||x0 - xhat0||^2 is the usual training loss of the process."""

    @abstractmethod
    def sampling_levels(self, steps: Steps) -> Tensor:
        """Return the t [number of steps] that a sampler visits, from most noise to least: float64, or int64 for VP.

        The end of the path, x0 without noise, is not among them. Raises ValueError if the process has no such steps.
        """

    def start(self, noise: Tensor, t: Tensor) -> Tensor:
        """Scale standard normal noise [B, C, H, W] to x_t at t (0-d), the first of the sampling levels."""
        return noise

    def log_snr(self, t: Tensor) -> Tensor:
        """Return lambda(t) = log(alpha^2 / sigma^2), float32 [B]."""
        alpha, sigma = self.alpha_sigma(t)
        return 2.0 * (alpha.log() - sigma.log())

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return x_t = alpha(t) x0 + sigma(t) noise, [B, C, H, W]."""
        alpha, sigma = self.alpha_sigma(t)
        return per_sample(alpha, x0) * x0 + per_sample(sigma, x0) * noise

    def variance_loss(self, model_output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor | None:
        """Return the loss [B] of a learned variance; None if the network predicts xhat0 only."""
        return None


def count_of(steps: Steps) -> int:
    """Return `steps`, a number; ValueError if it names steps of a schedule, which only VP has."""
    if not isinstance(steps, int):
        raise ValueError(f"{steps}: chooses from a schedule, which only vp has; must be a number")
    return steps
