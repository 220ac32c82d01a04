"""What a diffusion process has to say: how noise is added, what the network sees, how its output becomes xhat0.

    x_t = alpha(t) x0 + sigma(t) eps,   lambda(t) = log(alpha^2 / sigma^2)
    L_den = mean_i w(t_i) ||x0_i - xhat0_i||^2,   the norm being the mean over pixels and channels

Images are float tensors [B, C, H, W]; t is [B]; alpha, sigma, weights come back as float32 [B].
"""

from abc import ABC, abstractmethod

from torch import Tensor


def per_sample(value: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, ...] to multiply with `like` [B, ...]."""
    return value.reshape(-1, *([1] * (like.dim() - 1)))


class Process(ABC):
    """A forward process with the parametrisation of its network. Stateless: pure functions of tensors."""

    def output_channels(self, channels: int) -> int:
        """Channels the network must return for images with `channels` channels."""
        return channels

    @abstractmethod
    def sample_t(self, u: Tensor) -> Tensor:
        """Training noise levels t [B] from uniform numbers u [B] in (0, 1), by the inverse distribution function."""

    @abstractmethod
    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha(t), sigma(t): float32 [B] each."""

    @abstractmethod
    def model_input(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """What the network is called with: scaled images [B, C, H, W] and its time argument, float32 [B]."""

    @abstractmethod
    def to_x0(self, model_output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """xhat0 from the network's output; float32 [B, C, H, W]."""

    @abstractmethod
    def loss_weight(self, t: Tensor) -> Tensor:
        """w(t) [B] of the squared error ||x0 - xhat0||^2 that equals the process's usual training loss."""

    def log_snr(self, t: Tensor) -> Tensor:
        """lambda(t) = log(alpha^2 / sigma^2): float32 [B]."""
        alpha, sigma = self.alpha_sigma(t)
        return 2.0 * (alpha.log() - sigma.log())

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha(t) x0 + sigma(t) noise."""
        alpha, sigma = self.alpha_sigma(t)
        return per_sample(alpha, x0) * x0 + per_sample(sigma, x0) * noise

    def variance_loss(self, model_output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor | None:
        """Loss [B] of what the network predicts besides xhat0 (a learned variance); None where there is nothing."""
        return None
