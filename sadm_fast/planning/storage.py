"""Disk space of a run: its checkpoints and the averages that stay beyond them, which are nearly all that it writes."""

import math

from sadm_fast.config import Config
from sadm_fast.config_training import PowerEMA
from sadm_fast.planning.players import Player

_FP32 = 4


def checkpoint_bytes(config: Config, players: list[Player], feature_dim: int) -> int:
    """Count the tensors of one checkpoint: fp32 masters and both moments of each player, the averages, the queue."""
    learned = 3 * _FP32 * sum(player.trained for player in players if player.has_engine)
    queue = config.game.queue * (2 * feature_dim * _FP32 + _FP32 + 8)  # two rows, a weight and a label a sample
    return learned + len(config.train.profiles) * _average_bytes(config, players) + queue


def snapshot_bytes(config: Config, players: list[Player]) -> int:
    """Count the averages that stay of one step; 0 without train.ema_snapshot_every."""
    kept = sum(isinstance(profile, PowerEMA) for profile in config.train.profiles)
    return 0 if config.train.ema_snapshot_every is None else kept * _average_bytes(config, players)


def _average_bytes(config: Config, players: list[Player]) -> int:
    """Of one average in its file: whole, but for DiffFit's, which is of what is trained."""
    denoiser = players[0]
    return _FP32 * (denoiser.trained if config.denoiser.train == "difffit" else denoiser.everything)


def checkpoints_at_once(config: Config) -> int:
    """Count the checkpoints on the disk at the fullest moment: those that are kept, and the one being written."""
    train = config.train
    saves = -(-train.steps // train.checkpoint_every)
    kept_for_good = 0 if train.keep_every is None else train.steps // math.lcm(train.keep_every, train.checkpoint_every)
    return min(saves, min(saves, train.keep_last) + kept_for_good + 1)
