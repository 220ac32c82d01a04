"""The game of SADM (arXiv 2402.17563): the objective of each player, each formula beside its code.

    [1]  xhat0_i = to_x0(D_theta(x_t, t, y), x_t, t)                              `predict`
         L_den   = mean_i w(t_i) ||x0_i - xhat0_i||^2
    [2]  f_i = Psi(x0_i),  g_i = Psi(xhat0_i)                                     features of the structure encoder
         or with look_at=hidden: g_i the denoiser's tokens after a block
    [3]  w_i = sigmoid(gate_slope (log_snr_i - gate_log_snr))                     `gate`
    [4]  S   = sum_{i != j} w_i w_j rho(R(G)_ij - R(F)_ij) / sum_{i != j} w_i w_j  `Comparison`
    [4b] or with compare=tokens:   sum_i w_i mean_{p != q} rho(R(g_i)_pq - R(f_i)_pq) / sum_i w_i,  g_i, f_i [T, C]
                 compare=locations:  mean over p of [4] with f_ip, g_ip
                 compare=features:   sum_i w_i rho(||g_i - f_i||) / sum_i w_i
    [5]  min over theta:  L_den + lambda_s S                                      `denoiser_loss`
    [5b] or with strength=gradient: lambda_s ||dL_den/dxhat0|| / ||dS/dxhat0|| S  `at_strength`
                 per_sample: dS/dxhat0_i gets the length w_i lambda_s ||dL_den/dxhat0_i||
    [6]  max over Psi:    S                                                       `discriminator_loss`
    [7]  lambda_s(step):  a linear ramp, and a linear decay to the game's end     `schedule`

There is no real/fake logit: the discriminator only compares relations. S is 0, with gradient 0, where no pair counts
(no two samples of one class under `same_class`): that step has no structure term.

The game, its two directions, L_den, R on features of a ResNet-18: from the paper. [4b], [5b], relation, penalty,
normalisation, gate, schedule and queue: this project's choices, each a field of config_game.GameConfig. Everything here
is a function of tensors; engines, process groups and what travels between ranks are in engine/.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sadm_fast.counters import Purpose, normal_and_uniform_for, uniform_for
from sadm_fast.diffusion import Process
from sadm_kernels import Queue, structure_loss

Encode = Callable[[Tensor], Tensor]  # images or latents [B, C, H, W] -> features [B, d]

# A gate never closes wholly: a batch of noisy samples alone still has a defined weighted mean.
_SMALLEST_WEIGHT = 1e-6
_TINY = torch.finfo(torch.float32).tiny  # the sum of pair weights where there is no pair


class Batch(NamedTuple):
    """One micro-batch, noise levels drawn."""

    x0: Tensor  # clean images or latents, float32 [B, C, H, W]
    labels: Tensor  # true classes, int64 [B]
    condition: Tensor  # labels, some replaced by the null class, int64 [B]
    noise: Tensor  # eps, float32 [B, C, H, W]
    t: Tensor  # noise levels of the process [B]
    level: Tensor  # share of training noise levels below t, float64 [B] in (0, 1)
    more: tuple[Tensor, ...] = ()  # what the denoiser is told besides, of B samples each

    def each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The batch with change(x) for each of its tensors."""
        columns: Any = {name: change(x) for name, x in self._asdict().items() if isinstance(x, Tensor)}
        return self._replace(**columns, more=tuple(map(change, self.more)))


class Prediction(NamedTuple):
    """The denoiser's answer to a batch."""

    xhat0: Tensor  # float32 [B, C, H, W], with graph
    loss: Tensor  # denoising loss of each sample, float32 [B], with graph


class Structure(NamedTuple):
    """S in the denoiser's step, and the samples it compared."""

    distance: Tensor  # S, 0-d float32, with graph
    samples: Queue  # features f and g [B, d], weights [B], labels [B]; without graph


def draw(
    process: Process,
    x0: Tensor,
    labels: Tensor,
    sample_ids: Tensor,
    *,
    seed: int,
    null_class: int | None,
    label_dropout: float,
    samples_a_level: int = 1,
    more: tuple[Tensor, ...] = (),
) -> Batch:
    """Draw noise, noise level and label dropout of each sample, as functions of (seed, sample_ids int64 [B]).

    null_class: None: no label is dropped.
    samples_a_level: so many samples, from a multiple of that number on, share a noise level.
    """
    noise, (level, drop) = normal_and_uniform_for(
        seed, Purpose.NOISE, x0.shape[1:], (Purpose.TIME, Purpose.LABEL_DROP), sample_ids
    )
    if samples_a_level > 1:
        (level,) = uniform_for(seed, (Purpose.TIME,), sample_ids - sample_ids % samples_a_level)
    condition = labels if null_class is None else labels.masked_fill(drop < label_dropout, null_class)
    return Batch(x0, labels, condition, noise, process.sample_t(level), level, more)


def predict(process: Process, denoiser: Callable[..., Tensor], batch: Batch) -> Prediction:
    """[1] One forward of the denoiser: xhat0 and w(t) mean ||x0 - xhat0||^2 of each sample.

    With a learned variance, its loss (process.variance_loss) is added.
    """
    x_t = process.add_noise(batch.x0, batch.noise, batch.t)
    output = denoiser(*process.model_input(x_t, batch.t), batch.condition, *batch.more)
    xhat0 = process.to_x0(output, x_t, batch.t)
    loss = process.loss_weight(batch.t) * (batch.x0 - xhat0).square().flatten(1).mean(dim=1)
    variance = process.variance_loss(output, batch.x0, x_t, batch.t)
    return Prediction(xhat0, loss if variance is None else loss + variance)


def gate(log_snr: Tensor, gate_log_snr: float, gate_slope: float) -> Tensor:
    """[3] w_i of log_snr [B]: near 1 where there is less noise than at `gate_log_snr`, near 0 where there is more."""
    return torch.sigmoid(gate_slope * (log_snr - gate_log_snr)).clamp(min=_SMALLEST_WEIGHT)


@dataclass(frozen=True)
class Comparison:
    """[4] S, as the configuration wants it; the meaning of each field is in config_game.GameConfig.

    engine.sharing.SharedComparison is the same over all ranks.
    """

    relation: str = "euclidean"
    penalty: str = "squared"
    normalize: str = "unit"
    tau: float = 1.0
    delta: float = 1.0
    gate_log_snr: float | None = None
    gate_slope: float = 4.0
    same_class: bool = False
    compare: str = "samples"
    one_level: bool = False  # all samples have the noise level of the first
    impl: str = "auto"  # sadm_kernels.structure_loss

    def weight(self, log_snr: Tensor) -> Tensor | None:
        """w [B] by the gate; None where all samples count alike."""
        if self.gate_log_snr is None or self.one_level:
            return None
        return gate(log_snr, self.gate_log_snr, self.gate_slope)

    def factor(self, log_snr: Tensor) -> Tensor | float:
        """What S is multiplied by, 0-d: the gate, where it would cancel because all samples have one noise level."""
        if self.gate_log_snr is None or not self.one_level:
            return 1.0
        return gate(log_snr[0], self.gate_log_snr, self.gate_slope)

    @property
    def of_maps(self) -> bool:
        """Whether features are maps [B, T, C] in place of rows [B, d]."""
        return self.compare in ("tokens", "locations")

    def samples(self, log_snr: Tensor, labels: Tensor, queue: Queue | None) -> dict[str, Any]:
        """Keyword arguments of structure_loss beside the features: weight, labels, queue."""
        weight = self.weight(log_snr)
        if queue is not None:  # the queue keeps weights and labels in any case; drop what is not asked for
            queue = queue._replace(
                weight=None if weight is None else queue.weight, labels=queue.labels if self.same_class else None
            )
        return {"weight": weight, "labels": labels if self.same_class else None, "queue": queue}

    @property
    def loss(self) -> Callable[..., Tensor]:
        """sadm_kernels.structure_loss with this relation, penalty and normalisation."""
        options = ("relation", "penalty", "normalize", "tau", "delta", "impl")
        return partial(structure_loss, **{name: getattr(self, name) for name in options})

    def of_real(
        self, f: Tensor, log_snr: Tensor, labels: Tensor, queue: Queue | None = None
    ) -> Callable[[Tensor], Tensor]:
        """S as a function of the features g [B, d] of xhat0, for the features f [B, d] of x0: 0-d float32.

        In two steps, so that an implementation over several ranks sends f while g is computed.
        """
        if self.compare != "samples":
            return partial(self._directly, f, self.weight(log_snr), labels)
        return partial(self.loss, f, **self.samples(log_snr, labels, queue))

    def _directly(self, f: Tensor, weight: Tensor | None, labels: Tensor, g: Tensor) -> Tensor:
        """[4b]"""
        if self.of_maps and f.ndim != 3:
            raise ValueError(
                f"compare={self.compare}: Psi returned {list(f.shape)}, not tokens [B, T, C] of `map_stage`"
            )
        if self.of_maps and f.shape[1] != g.shape[1]:
            raise ValueError(
                f"compare={self.compare}: a map of {f.shape[1]} tokens against {g.shape[1]} of the denoiser; look at"
                " another stage of Psi"
            )
        w = torch.ones(len(f), device=f.device) if weight is None else weight
        real, fake = (self._rows(x) for x in (f, g))
        if self.compare == "features":
            distances = torch.linalg.vector_norm(fake - real, dim=-1)
            return (w * self._rho(distances)).sum() / w.sum()
        if self.compare == "tokens":
            difference = self._rho(self._relations(fake) - self._relations(real))  # [B, T, T]
            apart = 1.0 - torch.eye(f.shape[1], device=f.device)
            return (w * (difference * apart).sum(dim=(1, 2))).sum() / (w.sum() * apart.sum()).clamp(min=_TINY)
        real, fake = real.transpose(0, 1), fake.transpose(0, 1)  # [T, B, C]
        difference = self._rho(self._relations(fake) - self._relations(real)).mean(dim=0)  # [B, B]
        pairs = (w[:, None] * w).fill_diagonal_(0.0)
        if self.same_class:
            pairs = pairs * (labels[:, None] == labels)
        return (pairs * difference).sum() / pairs.sum().clamp(min=_TINY)

    def _rows(self, x: Tensor) -> Tensor:
        """Features in float32, of length 1 with normalize=unit; a row of zeros stays zero."""
        x = x.float()
        return F.normalize(x, dim=-1) if self.normalize == "unit" or self.relation == "cosine" else x

    def _relations(self, x: Tensor) -> Tensor:
        """R of each [M, C] in x [N, M, C]: [N, M, M]."""
        if self.relation == "cosine":
            return x @ x.transpose(1, 2)
        # Without a matrix product: exact, and with gradient 0 at distance 0.
        distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
        return distances if self.relation == "euclidean" else torch.exp(-distances.square() / (2.0 * self.tau**2))

    def _rho(self, x: Tensor) -> Tensor:
        if self.penalty == "squared":
            return x.square()
        return x.abs() if self.penalty == "absolute" else F.huber_loss(x, torch.zeros_like(x), "none", self.delta)


def structure_distance(
    compare: Comparison,
    process: Process,
    psi: Encode,
    batch: Batch,
    xhat0: Tensor,
    queue: Queue | None = None,
    tokens: Tensor | None = None,
) -> Structure:
    """[4] for the denoiser: f without graph, g with; the caller keeps Psi `frozen`.

    tokens: the denoiser's own [B, T, D], as g in place of Psi's features of xhat0; None: those.
    """
    log_snr = process.log_snr(batch.t)
    with torch.no_grad():
        f = psi(batch.x0)
    distance_from = compare.of_real(f, log_snr, batch.labels, queue)
    g = psi(xhat0) if tokens is None else tokens if compare.of_maps else tokens.mean(dim=1)
    distance = distance_from(g) * compare.factor(log_snr)
    weight = compare.weight(log_snr)
    weight = f.new_ones(len(f)) if weight is None else weight
    return Structure(distance, Queue(f, g.detach(), weight, batch.labels))


def denoiser_loss(loss: Tensor, distance: Tensor | None = None, lambda_s: float = 0.0) -> Tensor:
    """[5] L_den + lambda_s S, of each sample's denoising loss [B] and S 0-d (None before the game); 0-d."""
    denoising = loss.mean()
    return denoising if distance is None else denoising + lambda_s * distance


def at_strength(
    distance: Tensor, batch: Batch, xhat0: Tensor, loss_weight: Tensor, each: Tensor | None = None
) -> Tensor:
    """[5b] S 0-d with a gradient in xhat0 of the length of L_den's: 0-d; the graph behind S is used up.

    loss_weight: w(t) [B]. Where S has no gradient it stays without.
    each: None: the gradients as a whole; [B]: those of each sample, with this factor, so that S leads at no noise
        level: at high noise w(t) is small, and S that is the same at all levels has the longer gradient there.
    """
    (of_s,) = torch.autograd.grad(distance, xhat0)
    column = (-1, *[1] * (xhat0.ndim - 1))
    of_loss = 2.0 * loss_weight.view(column) * (xhat0.detach() - batch.x0) / xhat0.numel()
    if each is None:
        length, wanted = of_s.norm(), of_loss.norm()
    else:
        length = of_s.flatten(1).norm(dim=1).view(column)
        wanted = (each * of_loss.flatten(1).norm(dim=1)).view(column)
    direction = of_s * torch.where(length == 0, 0.0, wanted / torch.where(length == 0, 1.0, length))
    pull = (direction * xhat0).sum()
    return distance.detach() + (pull - pull.detach())


def discriminator_loss(
    compare: Comparison, process: Process, psi: Encode, batch: Batch, xhat0: Tensor, queue: Queue | None = None
) -> Tensor:
    """[6] -S, 0-d: xhat0 is detached, the gradient goes through f and g; one forward of Psi over both."""
    f, g = psi(torch.cat([batch.x0, xhat0.detach()])).chunk(2)
    log_snr = process.log_snr(batch.t)
    return -compare.of_real(f, log_snr, batch.labels, queue)(g) * compare.factor(log_snr)


def schedule(step: int, lambda_s: float, start: int, ramp_steps: int, end: int, decay_steps: int) -> float:
    """[7] lambda_s at 0-based `step`: 0 before `start` and from `end` on; it grows and falls over so many steps."""
    grown, left = max(0, step - start + 1), max(0, end - step)
    return lambda_s * min(1.0, grown / max(1, ramp_steps), left / max(1, decay_steps))


@contextmanager
def frozen(module: nn.Module) -> Iterator[nn.Module]:
    """Let no parameter of the module ask for a gradient; what asked before asks again at the end."""
    asking = [p for p in module.parameters() if p.requires_grad]
    for p in asking:
        p.requires_grad_(False)
    try:
        yield module
    finally:
        for p in asking:
            p.requires_grad_(True)
