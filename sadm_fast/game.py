"""The two players' objectives (SADM, arXiv 2402.17563): a batch in, losses out. No engine, no I/O.

    xhat0_i = to_x0(D_theta(x_t, t, y), x_t, t)         the denoiser's estimate of the clean sample
    f_i = Psi(x0_i),  g_i = Psi(xhat0_i)                features of the structure encoder
    S = sum_{i != j} w_i w_j rho(R(G)_ij - R(F)_ij) / sum_{i != j} w_i w_j
    min_theta max_Psi   L_den(theta) + lambda_s S(theta, Psi)

The denoiser descends L_den + lambda_s S with f detached and Psi frozen; the discriminator ascends S with xhat0
detached, through both f and g. There is no real/fake logit: the discriminator only compares relations. A queue of past
features (engine/feature_queue) adds the pairs of a sample of the batch and one of the past to both sums of S. Relation,
penalty, normalisation, gate and ramp are this project's choices; each is a field of the configuration.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sadm_fast.counters import Purpose, normal, uniform
from sadm_fast.diffusion import Process
from sadm_kernels import Queue, share, structure_loss

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
    _agreed: set[Any] = field(default_factory=set, init=False, repr=False, compare=False)

    def weight(self, log_snr: Tensor) -> Tensor | None:
        """w_i [B]: a soft gate, near 1 above `gate_log_snr` (less noise) and near 0 below; None without a gate."""
        if self.gate_log_snr is None:
            return None
        return torch.sigmoid(self.gate_slope * (log_snr - self.gate_log_snr)).clamp(min=_SMALLEST_WEIGHT)

    def distance_from(
        self, f: Tensor, log_snr: Tensor, labels: Tensor, queue: Queue | None = None
    ) -> Callable[[Tensor], Tensor]:
        """S of real features f [B, d], as a function of the generated g [B, d]: 0-d float32.

        With a group (scope=global) f is on its way to the other ranks when this returns, and travels while g is made.
        g itself, and the two sums of S, are waited for.
        """
        options = ("relation", "penalty", "normalize", "tau", "delta", "impl")
        compare = partial(structure_loss, **{name: getattr(self, name) for name in options})
        weight = self.weight(log_snr)
        if queue is not None:  # it has everything; what these rules do not ask for stays out
            queue = queue._replace(
                weight=None if weight is None else queue.weight, labels=queue.labels if self.same_class else None
            )
        given: dict[str, Any] = {"weight": weight, "labels": labels if self.same_class else None, "queue": queue}
        if self.group is None:
            return partial(compare, f, **given)
        if self.impl == "reference":
            compare = partial(compare, f, **given, group=self.group)
        else:
            # All ranks run one configuration on micro-batches of one size: what they agreed on once holds.
            size = (f.shape, f.dtype)
            compare = partial(compare, share(f, **given, group=self.group, check=size not in self._agreed))
            self._agreed.add(size)
        others = dist.get_world_size(self.group) - 1

        def distance(g: Tensor) -> Tensor:
            found = compare(g)
            # Data parallelism averages gradients over ranks, but each rank's rows already carry their whole gradient.
            return found + others * (found - found.detach())

        return distance


class Batch(NamedTuple):
    """What one micro-batch of the game is played on."""

    x0: Tensor  # clean images or latents, float32 [B, C, H, W]
    labels: Tensor  # true classes, int64 [B]
    condition: Tensor  # labels with some replaced by the null class, int64 [B]
    noise: Tensor  # eps, float32 [B, C, H, W]
    t: Tensor  # noise levels of the process [B]
    level: Tensor  # share of training noise levels below t, float64 [B] in (0, 1)


class Structure(NamedTuple):
    """S in the denoiser's step, and what it was taken from."""

    distance: Tensor  # 0-d float32, with graph
    samples: Queue  # features f and g [B, d], weights [B] and labels of the micro-batch, without graph


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
    noise = normal(seed, Purpose.NOISE, sample_ids, x0.shape[1:])
    level = uniform(seed, Purpose.TIME, sample_ids)[:, 0]
    dropped = uniform(seed, Purpose.LABEL_DROP, sample_ids)[:, 0] < label_dropout
    return Batch(x0, labels, torch.where(dropped, null_class, labels), noise, process.sample_t(level), level)


def predict(process: Process, denoiser: Callable[..., Tensor], batch: Batch) -> Prediction:
    """One forward of the denoiser: xhat0, and L_den = w(t) mean ||x0 - xhat0||^2 for each sample."""
    x_t = process.add_noise(batch.x0, batch.noise, batch.t)
    output = denoiser(*process.model_input(x_t, batch.t), batch.condition)
    xhat0 = process.to_x0(output, x_t, batch.t)
    loss = process.loss_weight(batch.t) * (batch.x0 - xhat0).square().flatten(1).mean(dim=1)
    variance = process.variance_loss(output, batch.x0, x_t, batch.t)
    return Prediction(xhat0, loss if variance is None else loss + variance)


def discriminator_loss(
    rules: Rules, process: Process, psi: Encode, batch: Batch, xhat0: Tensor, queue: Queue | None = None
) -> Tensor:
    """-S, with xhat0 detached; one forward of Psi over real and generated samples together."""
    f, g = psi(torch.cat([batch.x0, xhat0.detach()])).chunk(2)
    return -rules.distance_from(f, process.log_snr(batch.t), batch.labels, queue)(g)


def structure_distance(
    rules: Rules, process: Process, psi: nn.Module, batch: Batch, xhat0: Tensor, queue: Queue | None = None
) -> Structure:
    """S for the denoiser: f without graph, g with; the caller keeps Psi frozen."""
    log_snr = process.log_snr(batch.t)
    with torch.no_grad():
        f = psi(batch.x0)
    distance = rules.distance_from(f, log_snr, batch.labels, queue)
    g = psi(xhat0)
    weight = rules.weight(log_snr)
    weight = f.new_ones(len(f)) if weight is None else weight
    return Structure(distance(g), Queue(f, g.detach(), weight, batch.labels))


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
