"""The two players' objectives (SADM, arXiv 2402.17563): a batch in, losses out. No engine, no I/O.

    xhat0_i = to_x0(D_theta(x_t, t, y), x_t, t)         the denoiser's estimate of the clean sample
    f_i = Psi(x0_i),  g_i = Psi(xhat0_i)                features of the structure encoder
    S = sum_{i != j} w_i w_j rho(R(G)_ij - R(F)_ij) / sum_{i != j} w_i w_j
    min_theta max_Psi   L_den(theta) + lambda_s S(theta, Psi)

The denoiser descends L_den + lambda_s S with f detached and Psi frozen; the discriminator ascends S with xhat0
detached, through both f and g. There is no real/fake logit: the discriminator only compares relations. Relation,
penalty, normalisation, gate and ramp are this project's choices; each is a field of the configuration.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sadm_fast.counters import Stream, normal, uniform
from sadm_fast.diffusion import Process
from sadm_kernels import structure_loss

Encode = Callable[[Tensor], Tensor]

# A gate never closes wholly, so that a batch of noisy samples alone still has a defined weighted mean.
_SMALLEST_WEIGHT = 1e-6


@dataclass(frozen=True)
class Rules:
    """How relations are compared; the meaning of each field is in config.GameConfig."""

    relation: str = "euclidean"
    penalty: str = "squared"
    normalize: str = "unit"
    tau: float = 1.0
    delta: float = 1.0
    gate_log_snr: float | None = None
    gate_slope: float = 4.0
    same_class: bool = False
    impl: str = "auto"
    group: dist.ProcessGroup | None = None

    def weight(self, log_snr: Tensor) -> Tensor | None:
        """w_i [B]: a soft gate, near 1 above `gate_log_snr` (less noise) and near 0 below; None without a gate."""
        if self.gate_log_snr is None:
            return None
        return torch.sigmoid(self.gate_slope * (log_snr - self.gate_log_snr)).clamp(min=_SMALLEST_WEIGHT)

    def distance(self, f: Tensor, g: Tensor, log_snr: Tensor, labels: Tensor) -> Tensor:
        """S of real features f and generated features g, [B, d] each: 0-d float32."""
        distance = structure_loss(
            f,
            g,
            relation=self.relation,
            penalty=self.penalty,
            normalize=self.normalize,
            weight=self.weight(log_snr),
            labels=labels if self.same_class else None,
            tau=self.tau,
            delta=self.delta,
            impl=self.impl,
            group=self.group,
        )
        if self.group is None:
            return distance
        # Data parallelism averages gradients over ranks, but each rank's rows already carry their whole gradient.
        return distance + (dist.get_world_size(self.group) - 1) * (distance - distance.detach())


class Batch(NamedTuple):
    """What one micro-batch of the game is played on."""

    x0: Tensor  # clean images or latents, float32 [B, C, H, W]
    labels: Tensor  # true classes, int64 [B]
    condition: Tensor  # labels with some replaced by the null class, int64 [B]
    noise: Tensor  # eps, float32 [B, C, H, W]
    t: Tensor  # noise levels of the process [B]
    level: Tensor  # share of training noise levels below t, float64 [B] in (0, 1)


class Prediction(NamedTuple):
    """The denoiser's answer to a batch."""

    xhat0: Tensor  # float32 [B, C, H, W], with graph
    loss: Tensor  # denoising loss of each sample, float32 [B], with graph


def draw(
    process: Process,
    x0: Tensor,
    labels: Tensor,
    sample_ids: Tensor,
    *,
    seed: int,
    null_class: int,
    label_dropout: float,
) -> Batch:
    """Noise, noise level and label dropout of each sample, as functions of (seed, global sample counter)."""
    noise = normal(seed, Stream.NOISE, sample_ids, x0.shape[1:])
    level = uniform(seed, Stream.TIME, sample_ids)[:, 0]
    dropped = uniform(seed, Stream.LABEL_DROP, sample_ids)[:, 0] < label_dropout
    return Batch(x0, labels, torch.where(dropped, null_class, labels), noise, process.sample_t(level), level)


def predict(process: Process, denoiser: Callable[..., Tensor], batch: Batch) -> Prediction:
    """One forward of the denoiser: xhat0, and L_den = w(t) mean ||x0 - xhat0||^2 for each sample."""
    x_t = process.add_noise(batch.x0, batch.noise, batch.t)
    output = denoiser(*process.model_input(x_t, batch.t), batch.condition)
    xhat0 = process.to_x0(output, x_t, batch.t)
    loss = process.loss_weight(batch.t) * (batch.x0 - xhat0).square().flatten(1).mean(dim=1)
    variance = process.variance_loss(output, batch.x0, x_t, batch.t)
    return Prediction(xhat0, loss if variance is None else loss + variance)


def discriminator_loss(rules: Rules, process: Process, psi: Encode, batch: Batch, xhat0: Tensor) -> Tensor:
    """-S, with xhat0 detached; one forward of Psi over real and generated samples together."""
    f, g = psi(torch.cat([batch.x0, xhat0.detach()])).chunk(2)
    return -rules.distance(f, g, process.log_snr(batch.t), batch.labels)


def structure_distance(rules: Rules, process: Process, psi: nn.Module, batch: Batch, xhat0: Tensor) -> Tensor:
    """S for the denoiser: f without graph, g with; the caller keeps Psi frozen."""
    with torch.no_grad():
        f = psi(batch.x0)
    return rules.distance(f, psi(xhat0), process.log_snr(batch.t), batch.labels)


@contextmanager
def frozen(module: nn.Module) -> Iterator[nn.Module]:
    """The module with no parameter asking for a gradient; what it asked before comes back at the end."""
    asking = [p for p in module.parameters() if p.requires_grad]
    for p in asking:
        p.requires_grad_(False)
    try:
        yield module
    finally:
        for p in asking:
            p.requires_grad_(True)
