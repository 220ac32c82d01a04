"""The denoising loss by noise level: means over four equal parts of the noise levels that training draws."""

from collections.abc import Sequence

import torch
from torch import Tensor

_PARTS = 4


class LossByNoise:
    """Sums of the denoising loss in each part, and how many samples fell into it; they stay on the device.

    Attributes:
        sums: float64 [2, 4], sums and counts; those of several ranks may be added.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(2, _PARTS, dtype=torch.float64, device=device)

    def add(self, level: Tensor, loss: Tensor) -> None:
        """Add samples: the share of noise levels below each one's, float64 [B] in (0, 1), and its loss [B]."""
        part = (level * _PARTS).long().clamp(max=_PARTS - 1)
        values = torch.stack([loss.double(), torch.ones_like(loss, dtype=torch.float64)])
        self.sums.index_add_(1, part, values)


def mean_losses(sums: Sequence[Sequence[float]]) -> dict[str, float | None]:
    """loss_denoise, and loss_denoise_q1 (least noise) to _q4 of the parts, of `LossByNoise.sums`; None: no sample."""
    losses, counts = sums
    parts = {f"loss_denoise_q{i + 1}": ratio(losses[i], counts[i]) for i in range(_PARTS)}
    return {"loss_denoise": ratio(sum(losses), sum(counts)), **parts}


def ratio(total: float, count: float) -> float | None:
    """The mean, None of nothing."""
    return total / count if count else None
