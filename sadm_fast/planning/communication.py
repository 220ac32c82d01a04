"""Bytes that one rank hands to collectives in one iteration, as DeepSpeed (0.19.8) and the trainer call them.

Payload: the larger of a collective's input and output on one rank, that is the whole tensor that is reduced, gathered
or scattered. Wire: what a ring of n ranks sends from each rank for it, in one direction: 2 (n-1)/n of the payload for
an all-reduce, (n-1)/n for an all-gather or a reduce-scatter.
"""

from dataclasses import dataclass
from typing import Literal

from sadm_fast.config import Config
from sadm_fast.planning import zero3
from sadm_fast.planning.memory import offload_of, width
from sadm_fast.planning.players import Player

Operation = Literal["all-reduce", "all-gather", "reduce-scatter"]

_VOTE = 4 * 4  # vote.Vote: int32 [4] an iteration
_LOG = 15 * 8  # training_log.Interval: float64 [15] for each line
_CHECK = 7 * 8  # structure_loss compares the ranks' arguments: int64 [7] from each


@dataclass(frozen=True)
class Transfer:
    """What an iteration spends on one purpose."""

    purpose: str
    operation: Operation
    payload: float  # bytes; not whole where something happens every few iterations

    def wire(self, world_size: int) -> float:
        """Bytes that each rank of a ring sends."""
        rounds = 2 if self.operation == "all-reduce" else 1
        return rounds * (world_size - 1) / world_size * self.payload


def transfers(
    config: Config, players: list[Player], feature_dim: int, world_size: int, *, stage: int | None = None
) -> list[Transfer]:
    """One iteration of the game on one of `world_size` ranks; nothing for a rank that is alone.

    Args:
        feature_dim: of Psi.
        stage: of ZeRO, 0 to 3; None: the configuration's.
    """
    if world_size == 1:
        return []
    zero, w = config.deepspeed.zero_optimization, width(config)
    stage = zero.stage if stage is None else stage
    found = []
    for player in players:
        if not player.has_engine:
            continue
        # Stage 1 waits for the last micro-batch; from stage 2 on gradients are divided at once, so they travel each
        # time. Stages 1 and 2 reduce whole buckets to every rank, and each keeps its share of the result.
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
    """Features of all ranks, for each call of S."""
    game, train = config.game, config.train
    rows = n * train.micro_batch
    discriminating, denoising = psi.backwards, train.grad_accumulation
    calls = discriminating + denoising
    reference = config.implementation == "reference"
    element = 4 if reference else width(config)  # the reference widens its features before they travel
    one = 2 * rows * feature_dim * element
    if reference:  # at each call; the fast path does so at its first one
        one += n * _CHECK
    if reference or game.gate_log_snr is not None:
        one += rows * 4
    if game.same_class:
        one += rows * 8
    found = [Transfer("features of S", "all-gather", calls * one)]
    sums = calls * 2 * (4 if reference else 8)
    if reference:  # its gradient with respect to all rows goes back to their ranks; fused kernels compute it anew
        found.append(
            Transfer("gradients of features", "all-reduce", (2 * discriminating + denoising) * rows * feature_dim * 4)
        )
    return [*found, Transfer("sums of S", "all-reduce", sums)]


def _small(config: Config, players: list[Player], stage: int) -> float:
    steps = sum(player.steps for player in players)
    # DeepSpeed asks all ranks for the gradient's norm, and in bf16 at stages 1 and 2 for an overflow.
    norm = {0: 0, 1: 4, 2: 4, 3: 8 if offload_of(config) == "none" else 4}[stage]
    if config.train.precision == "bf16" and stage in (1, 2):
        norm += 1
    return _VOTE + steps * norm + _LOG / config.train.log_every
