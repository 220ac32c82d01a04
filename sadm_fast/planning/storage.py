"""Disk space of a run: its checkpoints, which are nearly all that it writes."""

import math

from sadm_fast.config import Config
from sadm_fast.planning.players import Player

_FP32 = 4


def checkpoint_bytes(config: Config, players: list[Player], feature_dim: int) -> int:
    """Count the tensors of one checkpoint: fp32 masters and both moments of each player, the average, the queue.

    The average is whole, but for DiffFit's, which is of what is trained.
    """
    denoiser = players[0]
    average = denoiser.trained if config.denoiser.train == "difffit" else denoiser.everything
    learned = 3 * _FP32 * sum(player.trained for player in players if player.has_engine)
    queue = config.game.queue * (2 * feature_dim * _FP32 + _FP32 + 8)  # two rows, a weight and a label a sample
    return learned + _FP32 * average + queue


def checkpoints_at_once(config: Config) -> int:
    """Count the checkpoints on the disk at the fullest moment: those that are kept, and the one being written."""
    train = config.train
    saves = -(-train.steps // train.checkpoint_every)
    kept_for_good = 0 if train.keep_every is None else train.steps // math.lcm(train.keep_every, train.checkpoint_every)
    return min(saves, min(saves, train.keep_last) + kept_for_good + 1)
