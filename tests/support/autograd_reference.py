"""The game in plain autograd, one process and float64, written from the formulas alone: what the engines must equal.

Nothing here comes from game.py, engine/ or sadm_kernels; only the networks are shared.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sadm_fast.config import Config
from sadm_fast.config_training import OptimizerConfig
from sadm_fast.game import Batch
from sadm_fast.models import StructureEncoder


@dataclass
class Trace:
    """What a run left behind: weights, and of each iteration the norms before clipping, and mean losses."""

    denoiser: dict[str, Tensor]
    psi: dict[str, Tensor]
    denoiser_norms: list[float] = field(default_factory=list)
    psi_norms: list[float | None] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    distances: list[float | None] = field(default_factory=list)


def _estimate(denoiser: nn.Module, batch: Batch, sigma_data: float) -> tuple[Tensor, Tensor]:
    """xhat0 [B, C, H, W] and the EDM loss [B] (Karras et al. 2022, table 1)."""
    sigma = batch.t.double().view(-1, 1, 1, 1)
    x0 = batch.x0.double()
    x_t = x0 + sigma * batch.noise.double()
    total = sigma**2 + sigma_data**2
    # The time argument stays float32, as the network takes it: its sinusoids would show the rounding.
    output = denoiser(x_t / total.sqrt(), 100.0 * batch.t.log(), batch.condition, *batch.more)
    xhat0 = sigma_data**2 / total * x_t + sigma * sigma_data / total.sqrt() * output
    weight = total / (sigma * sigma_data) ** 2
    return xhat0, (weight * (x0 - xhat0) ** 2).mean(dim=(1, 2, 3))


def _together(batches: list[Batch]) -> Batch:
    """One batch of several."""
    columns: Any = list(zip(*batches, strict=True))
    more = zip(*columns.pop(), strict=True)
    return Batch._make([*map(torch.cat, columns), tuple(map(torch.cat, more))])


@dataclass
class Seen:
    """Features, weights and labels of samples."""

    f: Tensor
    g: Tensor
    weight: Tensor
    labels: Tensor


def _seen(config: Config, f: Tensor, g: Tensor, batch: Batch) -> Seen:
    weight = torch.ones(len(f), dtype=torch.float64)
    if config.game.gate_log_snr is not None:
        log_snr = -2.0 * batch.t.double().log()
        weight = 1.0 / (1.0 + torch.exp(-config.game.gate_slope * (log_snr - config.game.gate_log_snr)))
    return Seen(f, g, weight, batch.labels)


def _structure(config: Config, batch: Seen, queue: list[Seen]) -> Tensor:
    """S over the pairs with a sample of the batch: Euclidean distances of unit rows, squared difference.

    queue: the last game.queue samples before this step, oldest first, one a piece.
    """
    if batch.f.ndim == 3 or config.game.compare == "features":
        return _other_structure(config, batch)
    size = len(batch.f)
    everything = [batch, *queue]
    f, g, weight, labels = (
        torch.cat([getattr(samples, name) for samples in everything]) for name in ("f", "g", "weight", "labels")
    )
    first, second = torch.combinations(torch.arange(len(f))).T
    first, second = first[first < size], second[first < size]
    f, g = f / f.norm(dim=1, keepdim=True), g / g.norm(dim=1, keepdim=True)
    difference = (g[first] - g[second]).norm(dim=1) - (f[first] - f[second]).norm(dim=1)
    pair = weight[first] * weight[second]
    if config.game.same_class:
        pair = pair * (labels[first] == labels[second])
    return (pair * difference**2).sum() / pair.sum() if pair.sum() > 0 else 0.0 * g.sum()


def _other_structure(config: Config, batch: Seen) -> Tensor:
    """S of game.compare other than samples, sample by sample and pair by pair."""
    f, g = (x / x.norm(dim=-1, keepdim=True) for x in (batch.f, batch.g))
    weight = batch.weight
    if config.game.compare == "features":
        return (weight * (g - f).square().sum(dim=1)).sum() / weight.sum()
    if config.game.compare == "locations":
        cells = [_structure(config, Seen(f[:, p], g[:, p], weight, batch.labels), []) for p in range(f.shape[1])]
        return torch.stack(cells).mean()
    first, second = torch.combinations(torch.arange(f.shape[1])).T
    relations = [(x[:, first] - x[:, second]).norm(dim=-1) for x in (f, g)]
    return (weight * (relations[1] - relations[0]).square().mean(dim=1)).sum() / weight.sum()


def _step(module: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, settings: OptimizerConfig) -> float:
    for p in module.parameters():
        p.grad = None
    trained = [p for p in module.parameters() if p.requires_grad]
    for p, gradient in zip(trained, torch.autograd.grad(loss, trained, materialize_grads=True), strict=True):
        p.grad = gradient
    norm = torch.cat([p.grad.flatten() for p in trained if p.grad is not None]).norm().item()
    if 0 < settings.gradient_clipping < norm:
        for p in trained:
            assert p.grad is not None
            p.grad *= settings.gradient_clipping / norm
    optimizer.step()
    return norm


def _optimizer(module: nn.Module, settings: OptimizerConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        [p for p in module.parameters() if p.requires_grad],
        lr=settings.lr, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay,
    )  # fmt: skip


def play(
    config: Config,
    denoiser: nn.Module,
    encoder: StructureEncoder,
    iterations: list[list[list[Batch]]],
    see: Callable[[Tensor], Tensor] = lambda samples: samples,
) -> Trace:
    """Train both networks on iterations[i][micro step][rank]; they end as float64. Psi encodes see(samples)."""
    denoiser, encoder = denoiser.double(), encoder.double()
    if config.game.compare in ("tokens", "locations"):
        encoder.map_stage = config.game.stage
    tokens: list[Tensor] = []
    if config.game.look_at == "hidden":
        block = denoiser.get_submodule(f"blocks.{config.game.block - 1}")
        block.register_forward_hook(lambda *args: tokens.append(args[-1]))
    optimizers = _optimizer(denoiser, config.denoiser_optimizer), _optimizer(encoder, config.discriminator_optimizer)

    def psi(samples: Tensor) -> Tensor:
        return encoder(see(samples))

    game, trace = config.game, Trace({}, {})
    queue: list[Seen] = []
    for step, micro_steps in enumerate(iterations):
        ranks = [batch for micro_step in micro_steps for batch in micro_step]
        # Pairs are made inside these: each rank's micro-batch, or all ranks' micro-batches of a micro step.
        groups = ranks
        if game.scope == "global":
            groups = [_together(micro_step) for micro_step in micro_steps]
        playing = game.mode != "plain" and step >= game.start_step and (not game.stop_step or step < game.stop_step)
        norm = None
        if playing and game.mode == "sadm":
            for _ in range(game.discriminator_steps):
                terms = []
                for batch in groups:
                    xhat0 = _estimate(denoiser, batch, 0.5)[0].detach()
                    terms.append(-_structure(config, _seen(config, psi(batch.x0.double()), psi(xhat0), batch), queue))
                norm = _step(encoder, optimizers[1], torch.stack(terms).mean(), config.discriminator_optimizer)
        trace.psi_norms.append(norm)
        loss = torch.cat([_estimate(denoiser, batch, 0.5)[1] for batch in ranks]).mean()
        trace.losses.append(loss.item())
        distance = None
        alone = playing and step < game.start_step + game.warmup_steps  # the discriminator learns alone
        optimizers[0].param_groups[0]["lr"] = 0.0 if alone else config.denoiser_optimizer.lr
        if playing:
            first = game.start_step + game.warmup_steps
            ramp = min(1.0, (step - first + 1) / game.ramp_steps) if game.ramp_steps else 1.0
            left = (game.stop_step or config.train.steps) - step
            ramp = min(ramp, left / game.decay_steps) if game.decay_steps else ramp
            ramp = 0.0 if alone else ramp
            terms, new, pulls = [], [], []
            for batch in groups:
                f = psi(batch.x0.double()).detach()
                xhat0, losses = _estimate(denoiser, batch, 0.5)
                g = psi(xhat0)
                if game.look_at == "hidden":
                    g = tokens[-1] if f.ndim == 3 else tokens[-1].mean(dim=1)
                seen = _seen(config, f, g, batch)
                terms.append(_structure(config, seen, queue))
                pulls.append(terms[-1])
                if game.strength != "weight":
                    both = losses.mean(), terms[-1]
                    of_loss, of_s = (torch.autograd.grad(x, xhat0, retain_graph=True)[0].flatten(1) for x in both)
                    factor = of_loss.norm() / of_s.norm()
                    if game.strength == "per_sample":
                        factor = (seen.weight * of_loss.norm(dim=1) / of_s.norm(dim=1))[:, None]
                    pulls[-1] = (factor * of_s * xhat0.flatten(1)).sum()
                columns = seen.f, seen.g.detach(), seen.weight, seen.labels
                new += [Seen(*one) for one in zip(*(column.split(1) for column in columns), strict=True)]
            queue = (queue + new)[-game.queue :] if game.queue else []
            distance = torch.stack(terms).mean()
            loss = loss + game.lambda_s * ramp * torch.stack(pulls).mean()
        trace.distances.append(None if distance is None else distance.item())
        trace.denoiser_norms.append(_step(denoiser, optimizers[0], loss, config.denoiser_optimizer))
    trace.denoiser = {name: p.detach() for name, p in denoiser.named_parameters() if p.requires_grad}
    trace.psi = {name: p.detach() for name, p in encoder.named_parameters() if p.requires_grad}
    return trace
