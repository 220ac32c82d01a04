"""Exponential moving average of the denoiser, in fp32, of exactly the fp32 weights that this rank's optimizer owns.

ZeRO spreads the fp32 master weights over ranks; averaging each rank's own fragments needs no communication and no
second copy of the whole. Full weights are put together only when somebody wants to look or save.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from sadm_fast.config import ExponentialEMA, PowerEMA
from sadm_fast.engine.masters import Fragment


def power_gamma(std: float) -> float:
    """gamma of EDM2's power-function EMA with relative width `std`: the largest root of
    g^3 + 7 g^2 + (16 - std^-2) g + (12 - std^-2) (Karras et al. 2023, "Analyzing and Improving the Training Dynamics
    of Diffusion Models"; std < 0.2887).
    """
    return float(np.roots([1.0, 7.0, 16.0 - std**-2, 12.0 - std**-2]).real.max())


def decay_schedule(ema: PowerEMA | ExponentialEMA) -> Callable[[int], float]:
    """The decay of update number n = 1, 2, ...; the first one is 0 for both (the average starts at the weights)."""
    if isinstance(ema, PowerEMA):
        gamma = power_gamma(ema.std)
        return lambda n: (1.0 - 1.0 / n) ** (gamma + 1.0)
    # A constant decay would remember the initialisation for 1 / (1 - decay) steps.
    return lambda n: min(ema.decay, (n - 1) / (n + 9))


class EMA:
    """Running average of fragments.

    Args:
        fragments: what this rank owns; asked anew at each update, because an engine may replace its tensors.
        ema: the profile.
    """

    def __init__(self, fragments: Callable[[], Sequence[Fragment]], ema: PowerEMA | ExponentialEMA) -> None:
        self._fragments, self._decay = fragments, decay_schedule(ema)
        self.average = [f._replace(value=f.value.detach().clone()) for f in fragments()]
        self.updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after an optimizer step."""
        self.updates += 1
        masters = [f.value.detach() for f in self._fragments()]
        torch._foreach_lerp_([f.value for f in self.average], masters, 1.0 - self._decay(self.updates))

    @torch.no_grad()
    def load(self, full: Mapping[str, Tensor], updates: int) -> None:
        """Take the averages from full parameters by name (whatever the world size they were saved at)."""
        for name, start, value in self.average:
            value.copy_(full[name].flatten()[start : start + value.numel()])
        self.updates = updates
