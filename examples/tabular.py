"""Tabular data of your own: breast tumours, 569 patients with 30 measurements each, benign or malignant (scikit-learn).

python examples/tabular.py            # plain against the game over five seeds, five minutes of one core
"""

import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import sadm_fast
from examples.compare import Split, compare, correlation, marginals, two_sample

COLUMNS = 30
CONFIG: dict[str, Any] = {
    "name": "tabular",
    "diffusion": {"process": "edm", "sigma_data": 1.0},  # of standardised columns
    "structure_encoder": {"pretrain": {"steps": 200, "batch": 64, "lr": 1e-3}},
    "game": {"lambda_s": 0.3, "gate_log_snr": -2.2},
    "denoiser_optimizer": {"lr": 1e-3, "warmup_steps": 50, "decay_steps": 500},
    "discriminator_optimizer": {"lr": 1e-6},
    "train": {"steps": 2000, "micro_batch": 64, "log_every": 100, "sample_every": 2000, "checkpoint_every": 2000},
    "logging": [],
}


class RowDenoiser(sadm_fast.Denoiser):
    """A residual network over the columns of a row [B, 30]; noise level and class are added in each layer."""

    def __init__(self, num_classes: int, width: int = 128, depth: int = 3) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.label = nn.Embedding(num_classes + 1, width)
        self.level = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width))
        self.first, self.last = nn.Linear(COLUMNS, width), nn.Linear(width, COLUMNS)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
            for _ in range(depth)
        )

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        angles = t[:, None] / 100 * 2.0 ** torch.arange(-3, 5, device=t.device)  # t is 100 ln sigma
        condition = self.level(torch.cat([angles.cos(), angles.sin()], dim=1)) + self.label(y)
        h = self.first(x)
        for layer in self.layers:
            h = h + layer(h + condition)
        return self.last(h)


class RowEncoder(sadm_fast.StructureEncoder):
    """Rows [B, 30] to features [B, 32]."""

    feature_dim = 32

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(COLUMNS, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 32))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def split(seed: int) -> Split:
    """Two thirds of the patients to train on; columns as logarithms, standardised by those."""
    found = load_breast_cancer()
    rows, labels = np.log(found.data + 0.01), found.target  # sizes and their spreads, skewed; some are 0
    first, second, of_first, of_second = train_test_split(
        rows, labels, test_size=1 / 3, stratify=labels, random_state=seed
    )
    mean, std = first.mean(axis=0), first.std(axis=0)
    train = sadm_fast.Arrays(
        ((first - mean) / std).astype(np.float32), of_first, list(found.target_names), where="breast tumours"
    )
    return Split(train, ((second - mean) / std).astype(np.float32), of_second, np.arange(len(second)))


def score(parts: Split, drawn: np.ndarray, seed: int) -> dict[str, float]:
    """Scores of drawn rows [N, 30]."""
    return {
        "two-sample": two_sample(parts.held_out, drawn, parts.groups, seed),
        "marginals": marginals(parts.held_out, drawn),
        "correlation": correlation(parts.held_out, drawn),
    }


def main(argv: list[str] | None = None) -> int:
    print(compare(CONFIG, RowDenoiser, RowEncoder, split, score, argv))
    return 0


if __name__ == "__main__":
    sys.exit(main())
