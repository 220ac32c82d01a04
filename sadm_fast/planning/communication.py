"""Bytes in the collectives of one iteration, as DeepSpeed (0.19.8) and the trainer call them.

Payload: the whole tensor that is reduced, gathered or scattered (the larger of input and output on one rank).
Wire: the bytes that each rank of a ring of n sends in one direction: 2 (n-1)/n of the payload for an all-reduce,
(n-1)/n of it for an all-gather or a reduce-scatter.
"""

from dataclasses import dataclass
from typing import Literal

from sadm_fast.config import Config
from sadm_fast.planning import zero3
from sadm_fast.planning.memory import offload_of, width
from sadm_fast.planning.players import Player

Operation = Literal["all-reduce", "all-gather", "reduce-scatter"]

VOTE = 3 * 4  # ranks.vote.Vote: int32 [3] each iteration
LOG_LINE = 16 * 8  # run.log.Interval: float64 [16] each line of metrics.jsonl
_CHECK = 1024  # sadm_kernels.gathering compares the ranks' arguments: uint8 [1024] from each


@dataclass(frozen=True)
class Transfer:
    """The collectives of one iteration that serve one purpose, added up."""

    purpose: str
    operation: Operation
    payload: float  # bytes; a fraction where the collective runs every few iterations

    def wire(self, world_size: int) -> float:
        """Return the bytes that each rank of a ring sends."""
        rounds = 2 if self.operation == "all-reduce" else 1
        return rounds * (world_size - 1) / world_size * self.payload


def transfers(
    config: Config, players: list[Player], feature_dim: int, world_size: int, *, stage: int | None = None
) -> list[Transfer]:
    """List the transfers of one iteration of the game on one of `world_size` ranks; none for world_size 1.

    Args:
        feature_dim: length of Psi's features.
        stage: ZeRO stage, 0 to 3; None: as configured.
    """
    if world_size == 1:
        return []
    zero, w = config.deepspeed.zero_optimization, width(config)
    stage = zero.stage if stage is None else stage
    found = []
    for player in players:
        if not player.has_engine:
            continue
        # Stage 1 reduces after the last micro-batch. Stages 2 and 3 divide gradients, so they reduce after each one.
        # Stages 1 and 2 all-reduce whole buckets, and each rank keeps its share of the result.
        reductions = player.backwards if stage >= 2 else player.steps
        found.append(
            Transfer(
                f"{player.name} gradients",
                "reduce-scatter" if stage == 3 else "all-reduce",
                reductions * w * player.trained,
            )
        )
        if stage in (1, 2):
            found.append(Transfer(f"{player.name} weights", "all-gather", player.steps * w * player.trained))
        elif stage == 3:
            found.append(Transfer(f"{player.name} weights", "all-gather", w * zero3.gathered(player, zero).in_all))
    if config.game.scope == "global" and config.game.mode != "plain":
        found += _global_structure(config, players[1], feature_dim, world_size)
    if config.game.queue:
        samples = world_size * config.train.micro_batch * config.train.grad_accumulation
        found.append(Transfer("feature queue", "all-gather", samples * (2 * feature_dim + 2) * 4))
    found.append(Transfer("votes, norms, logging", "all-reduce", _small(config, players, stage)))
    return found


def _global_structure(config: Config, psi: Player, feature_dim: int, n: int) -> list[Transfer]:
    """List what S sends with game.scope=global: features, gradients of features (reference), sums."""
    game, train = config.game, config.train
    rows = n * train.micro_batch
    discriminating, denoising = psi.backwards, train.grad_accumulation
    calls = discriminating + denoising
    reference = config.implementation == "reference"
    element = 4 if reference else width(config)  # the reference widens its features before they travel
    one = 2 * rows * feature_dim * element
    if reference:  # the reference compares the ranks' arguments at each call, the fast path at the first only
        one += n * _CHECK
    if reference or game.gate_log_snr is not None:
        one += rows * (8 if reference else 4)  # weights
    if game.same_class:
        one += rows * 8
    found = [Transfer("features of S", "all-gather", calls * one)]
    sums = calls * 2 * (4 if reference else 8)
    if reference:  # autograd sends gradients of gathered rows back to their ranks; fused kernels recompute them instead
        gradients = (2 * discriminating + denoising) * feature_dim * 4 + calls * 8  # of f and g, and of weights
        found.append(Transfer("gradients of features", "all-reduce", gradients * rows))
    return [*found, Transfer("sums of S", "all-reduce", sums)]


def _small(config: Config, players: list[Player], stage: int) -> float:
    steps = sum(player.steps for player in players)
    # DeepSpeed all-reduces the gradient's norm, and in bf16 at stages 1 and 2 an overflow flag.
    norm = {0: 0, 1: 4, 2: 4, 3: 8 if offload_of(config) == "none" else 4}[stage]
    if config.train.precision == "bf16" and stage in (1, 2):
        norm += 1
    return VOTE + steps * norm + LOG_LINE / config.train.log_every
