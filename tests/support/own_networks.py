"""Networks and data of a caller's own, of no image: six numbers a sample. As a program: a training on all ranks.

The denoiser has 294 weights: on two ranks DeepSpeed fills its partitions up.
"""

import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sadm_fast import Arrays, Denoiser, StructureEncoder
from sadm_fast.api import train

WIDTH = 6


class OwnDenoiser(Denoiser):
    """Two layers over the sample, its noise level and its class."""

    def __init__(self, num_classes: int, hidden: int = 16) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.label = nn.Embedding(num_classes + 1, hidden)
        self.first = nn.Linear(WIDTH + 1, hidden)
        self.last = nn.Linear(hidden, WIDTH)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        level = (t / 1000).to(x.dtype).unsqueeze(1)
        return self.last(torch.tanh(self.first(torch.cat([x, level], dim=1)) + self.label(y)))


class OwnEncoder(StructureEncoder):
    feature_dim = 4

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, self.feature_dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def own_data(count: int = 60, classes: int = 3) -> Arrays:
    """`count` samples around a mean of their own for each class."""
    rng = np.random.default_rng(0)
    labels = np.arange(count) % classes
    samples = rng.normal(0, 0.5, (count, WIDTH)) + labels[:, None]
    return Arrays(samples.astype(np.float32), labels)


def own_config(**changes: Any) -> dict[str, Any]:
    """A configuration of a second; `changes` by block."""
    tiny: dict[str, Any] = {
        "name": "own",
        "structure_encoder": {"pretrain": {"steps": 3, "batch": 8}},
        "discriminator_optimizer": {"lr": 1e-3},
        "train": {"steps": 4, "micro_batch": 8, "log_every": 1, "sample_every": 2, "checkpoint_every": 2},
        "sampling": {"steps": 2, "columns": 3, "rows": 2},
        "logging": [],
    }
    return {
        **tiny,
        **{key: {**tiny.get(key, {}), **value} if isinstance(value, dict) else value for key, value in changes.items()},
    }


if __name__ == "__main__":
    _, run, stage, micro_batch = sys.argv
    config = own_config(
        game={"mode": "plain"},
        train={"micro_batch": int(micro_batch)},
        deepspeed={"zero_optimization": {"stage": int(stage)}},
    )
    assert train(config, denoiser=OwnDenoiser, psi=OwnEncoder, data=own_data(), run_dir=run)
