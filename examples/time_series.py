"""Time series of your own: 1,046 trading days of one share, five numbers a day (matplotlib ships them).

    python examples/time_series.py        # plain against the game over five seeds, eight minutes of one core

A sample is 16 days in a row: return over night and over the day, how far the day went up and down, change of volume.
Its class is how much the days' returns vary: a third of the training samples each is calm, usual, wild.
"""

import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from matplotlib.cbook import get_sample_data
from torch import Tensor, nn

import sadm_fast
from examples.compare import Split, compare, correlation, marginals, two_sample

CHANNELS, DAYS = 5, 16
BLOCK = 48  # days in a row that are all trained on, or all held out
CLASSES = ("calm", "usual", "wild")
CONFIG: dict[str, Any] = {
    "name": "time-series",
    "diffusion": {"process": "edm", "sigma_data": 1.0},  # of standardised channels
    "structure_encoder": {"pretrain": {"steps": 200, "batch": 64, "lr": 1e-3}},
    "game": {"lambda_s": 0.3, "gate_log_snr": -2.2},
    "denoiser_optimizer": {"lr": 1e-3, "warmup_steps": 50, "decay_steps": 500},
    "discriminator_optimizer": {"lr": 1e-6},
    "train": {"steps": 1500, "micro_batch": 64, "log_every": 100, "sample_every": 1500, "checkpoint_every": 1500},
    "logging": [],
}


class SeriesDenoiser(sadm_fast.Denoiser):
    """A residual network over days [B, 5, 16], convolutions of growing reach; noise level and class in each layer."""

    def __init__(self, num_classes: int, width: int = 32) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.label = nn.Embedding(num_classes + 1, width)
        self.level = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width))
        self.first, self.last = nn.Conv1d(CHANNELS, width, 1), nn.Conv1d(width, CHANNELS, 1)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(4, width), nn.SiLU(), nn.Conv1d(width, width, 3, padding=reach, dilation=reach),
                nn.SiLU(), nn.Conv1d(width, width, 1),
            )
            for reach in (1, 2, 4, 8)
        )  # fmt: skip

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        angles = t[:, None] / 100 * 2.0 ** torch.arange(-3, 5, device=t.device)  # t is 100 ln sigma
        condition = self.level(torch.cat([angles.cos(), angles.sin()], dim=1)) + self.label(y)
        h = self.first(x)
        for layer in self.layers:
            h = h + layer(h + condition[:, :, None])
        return self.last(h)


class SeriesEncoder(sadm_fast.StructureEncoder):
    """Days [B, 5, 16] to features [B, 32]."""

    feature_dim = 32

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(CHANNELS, 32, 3, padding=1), nn.SiLU(), nn.Conv1d(32, 64, 3, stride=2, padding=1), nn.SiLU(),
            nn.Conv1d(64, 64, 3, stride=2, padding=1), nn.SiLU(), nn.Flatten(), nn.Linear(4 * 64, 32),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def days() -> np.ndarray:
    """Each day's five numbers: float64 [1046, 5]."""
    with np.load(get_sample_data("goog.npz", asfileobj=False)) as file:
        found = file["price_data"]
    price = {name: np.log(found[name]) for name in ("open", "high", "low", "close")}
    volume = np.log(found["volume"])
    columns = [
        price["open"][1:] - price["close"][:-1],
        (price["close"] - price["open"])[1:],
        (price["high"] - np.maximum(price["open"], price["close"]))[1:],
        (np.minimum(price["open"], price["close"]) - price["low"])[1:],
        volume[1:] - volume[:-1],
    ]
    return np.stack(columns, axis=1)


def split(seed: int) -> Split:
    """Hold out every third block of days, another third for another seed; samples overlap inside a block only."""
    blocks = np.array_split(days(), len(days()) // BLOCK)
    of_block = [np.lib.stride_tricks.sliding_window_view(block, DAYS, axis=0) for block in blocks]  # [n, 5, 16] each
    held = [number % 3 == seed % 3 for number in range(len(blocks))]
    known = np.concatenate([block for block, is_held in zip(blocks, held, strict=True) if not is_held])
    mean, std = known.mean(axis=0)[:, None], known.std(axis=0)[:, None]

    def samples(wanted: bool) -> tuple[np.ndarray, np.ndarray]:
        numbers = [n for n, is_held in enumerate(held) if is_held == wanted]
        values = np.concatenate([(of_block[n] - mean) / std for n in numbers]).astype(np.float32)
        return values, np.repeat(numbers, [len(of_block[n]) for n in numbers])

    (train, _), (held_out, groups) = samples(False), samples(True)
    thirds = np.quantile(_spread(train), [1 / 3, 2 / 3])
    arrays = sadm_fast.Arrays(train, np.digitize(_spread(train), thirds), CLASSES, where="goog.npz")
    return Split(arrays, held_out, np.digitize(_spread(held_out), thirds), groups)


def _spread(samples: np.ndarray) -> np.ndarray:
    """Standard deviation of the days' returns: [N] of [N, 5, 16]."""
    return samples[:, 1].std(axis=1)


def clustering(samples: np.ndarray) -> np.ndarray:
    """How much wild days follow each other: correlation of |return| one to five days apart, [5], of [N, 5, 16]."""
    size = np.abs(samples[:, 1])
    return np.array([np.corrcoef(size[:, lag:].ravel(), size[:, :-lag].ravel())[0, 1] for lag in range(1, 6)])


def score(parts: Split, drawn: np.ndarray, seed: int) -> dict[str, float]:
    """Scores of drawn samples [N, 5, 16]."""
    real = parts.held_out
    by_day = [samples.transpose(0, 2, 1).reshape(-1, CHANNELS) for samples in (real, drawn)]
    return {
        "two-sample": two_sample(real.reshape(len(real), -1), drawn.reshape(len(drawn), -1), parts.groups, seed),
        "marginals": marginals(*by_day),
        "correlation": correlation(*by_day),
        "clustering": float(np.mean(np.abs(clustering(real) - clustering(drawn)))),
    }


def main(argv: list[str] | None = None) -> int:
    print(compare(CONFIG, SeriesDenoiser, SeriesEncoder, split, score, argv))
    return 0


if __name__ == "__main__":
    sys.exit(main())
