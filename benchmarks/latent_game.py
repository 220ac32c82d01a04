"""The game whose speed is measured: DiT-S/4 on made-up 32x32x4 latents, ResNet-18 as Psi."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from benchmarks.measure import Call
from sadm_fast.build import build_denoiser, build_psi
from sadm_fast.config import Config, check_config
from sadm_fast.game import Batch, draw

CLASSES = 1000
Network = TypeVar("Network", bound=nn.Module)


def game_config(mode: str = "sadm", *, micro_batch: int = 32, implementation: str = "fast", **blocks: Any) -> Config:
    """Make the configuration; `blocks` replaces denoiser, extends data, train, structure_encoder, zero_optimization."""
    return check_config(
        {
            "name": "benchmark",
            "implementation": implementation,
            "data": {
                "source": "latents",
                "path": "made-up",
                "resolution": 256,
                "channels": 3,
                **blocks.get("data", {}),
            },
            "latents": {"autoencoder": "made-up"},
            "diffusion": {"process": "vp", "learn_sigma": True},
            "denoiser": blocks.get("denoiser", {"name": "DiT-S/4", "num_classes": CLASSES}),
            "structure_encoder": {"architecture": "resnet18", **blocks.get("structure_encoder", {})},
            "game": {"mode": mode},
            "train": {"micro_batch": micro_batch, **blocks.get("train", {})},
            "deepspeed": {"zero_optimization": blocks.get("zero_optimization", {})},
        }
    )


def made_up(config: Config, first: int) -> Batch:
    """Draw one micro-batch of normal latents, for the sample numbers from `first` on."""
    ids = torch.arange(first, first + config.train.micro_batch)
    x0 = torch.randn(len(ids), *config.sample_shape, generator=torch.Generator().manual_seed(first))
    return draw(
        config.process, x0, ids % CLASSES, ids, seed=0, null_class=CLASSES, label_dropout=config.denoiser.label_dropout
    )


def with_noise(network: Network) -> Network:
    """Add noise to its weights: at a DiT's start most gradients are exactly 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    return network


def made_up_players(config: Config, device: torch.device) -> Any:
    """Make engine.players.Players; the denoiser is one `with_noise`."""
    from sadm_fast.engine.players import Players  # imports DeepSpeed, which must be told about the accelerator before

    denoiser = with_noise(build_denoiser(config, CLASSES))
    return Players(config, denoiser, None if config.game.mode == "plain" else build_psi(config), device)


def iteration(config: Config, device: torch.device, rank: int = 0) -> Call:
    """Return the call that is timed: one iteration of the game on a fixed batch."""
    batch = made_up(config, rank * config.train.micro_batch)
    return partial(made_up_players(config, device).iteration, [batch], 0)


def steady_iteration(config: Config, players: Any) -> Callable[[], None]:
    """The trainer's work on one micro-batch after another, each settled when the next is on its way."""
    from sadm_fast.ema import EMA
    from sadm_fast.engine.masters import named, owned

    engine = players.denoiser
    ema = EMA(lambda: list(owned(engine)), config.train.ema, lambda fragments: named(engine.module, fragments))
    if players.fused:
        ema.join(players.fused["denoiser"])
    on_its_way: list[Any] = []

    def settle() -> None:
        if on_its_way:
            players.settle(on_its_way.pop())
            ema.update()

    given = made_up(config, 0)
    x0, labels, ids = (v.to(engine.device) for v in (given.x0, given.labels, torch.arange(len(given.x0))))
    dropout = config.denoiser.label_dropout

    def iteration() -> None:
        players.set_learning_rates(0)
        batch = draw(config.process, x0, labels, ids, seed=0, null_class=CLASSES, label_dropout=dropout)
        on_its_way.append(players.launch([batch], 0, settle))

    return iteration
