"""The moving average (EMA) of the denoiser's fp32 master weights.

ZeRO divides the masters over ranks. Each rank averages its own fragments, without communication and without a copy of
the whole. Full weights are gathered only for pictures and checkpoints.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from sadm_fast.config_training import ConstantEMA, ExponentialEMA, PowerEMA
from sadm_fast.engine.fused_step import FusedStep
from sadm_fast.engine.masters import Fragment


def power_gamma(std: float) -> float:
    """Return gamma of EDM2's power-function EMA with relative width `std` < 0.2887.

    It is the largest root of g^3 + 7 g^2 + (16 - std^-2) g + (12 - std^-2). Source: Karras et al. 2023, "Analyzing and
    Improving the Training Dynamics of Diffusion Models".
    """
    return float(np.roots([1.0, 7.0, 16.0 - std**-2, 12.0 - std**-2]).real.max())


Profile = PowerEMA | ExponentialEMA | ConstantEMA


def decay_schedule(ema: Profile) -> Callable[[int], float]:
    """Return the decay of update n = 1, 2, ... as a function of n.

    It is 0 at n = 1, which copies the weights, but for a constant decay, which averages the initialisation as well.
    """
    if isinstance(ema, PowerEMA):
        gamma = power_gamma(ema.std)
        return lambda n: (1.0 - 1.0 / n) ** (gamma + 1.0)
    if isinstance(ema, ConstantEMA):
        return lambda n: ema.decay
    # Ramped up: a constant decay would keep the initialisation for 1 / (1 - decay) steps.
    return lambda n: min(ema.decay, (n - 1) / (n + 9))


def posthoc_weights(snapshots: Sequence[tuple[int, float]], wanted: tuple[int, float]) -> tuple[list[float], float]:
    """How much of each power-function average makes the wanted one, each given as (update n, relative width std).

    An average after n updates with exponent g holds the weights of update k to the share
    (k^(g+1) - (k-1)^(g+1)) / n^(g+1): the integral over [k-1, k] of its profile p(t) = (g+1) t^g / n^(g+1). The
    weights are the least squares fit of the wanted profile by those of the snapshots, with the closed form of their
    inner products, and sum to 1 so that weights which stand still are their own average.

    Returns the weights and the error that remains, as a share of the wanted profile's norm.
    Source: Karras et al. 2023, section 3.2 and appendix C.
    """

    def inner(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Inner products of profiles, each (n, g): the integral of their product over [0, the smaller n]."""
        (n, g), (m, h) = a.T[:, :, None], b.T[:, None, :]
        # (g+1) (h+1) / (g+h+1) * min^(g+h+1) / (n^(g+1) m^(h+1)), without large powers.
        ratio = np.where(n < m, (n / m) ** (h + 1), (m / n) ** (g + 1))
        return np.asarray((g + 1) * (h + 1) / (g + h + 1) * ratio / np.minimum(n, m))

    have = np.array([(n, power_gamma(std)) for n, std in snapshots], dtype=np.float64)
    want = np.array([(wanted[0], power_gamma(wanted[1]))], dtype=np.float64)
    # Least squares with sum 1, by its optimality conditions; each profile scaled to norm 1.
    gram, side = inner(have, have), inner(have, want)[:, 0]
    scale = np.sqrt(np.diag(gram))
    size = len(have)
    system = np.zeros((size + 1, size + 1))
    system[:size, :size] = gram / np.outer(scale, scale)
    system[:size, size] = system[size, :size] = 1 / scale
    solution = np.linalg.lstsq(system, np.append(side / scale, 1.0), rcond=1e-13)[0][:size] / scale
    norm = float(inner(want, want)[0, 0])
    left = norm - 2 * float(solution @ side) + float(solution @ gram @ solution)
    return [float(weight) for weight in solution], float(np.sqrt(max(left, 0.0) / norm))


class EMA:
    """The average of this rank's fragments.

    Args:
        fragments: returns the masters that this rank owns, the fewer the faster. It is called at each update, because
            an engine may replace its tensors.
        ema: the profile.
        named: tells fragments of these as fragments of the network's weights, views of the same memory.
    """

    def __init__(
        self,
        fragments: Callable[[], Sequence[Fragment]],
        ema: Profile,
        named: Callable[[Iterable[Fragment]], Iterable[Fragment]] = iter,
    ) -> None:
        self._fragments, self._decay, self._named = fragments, decay_schedule(ema), named
        self._average = [f._replace(value=f.value.detach().clone()) for f in fragments()]
        self.updates = 0
        self._joined = False

    def join(self, step: FusedStep) -> None:
        """Be moved by the optimizer's own pass over the masters; `update` then only counts."""
        step.average(
            [f.value for f in self._average],
            [f.value for f in self._fragments()],
            lambda: self._decay(self.updates + 1),
        )  # fmt: skip
        self._joined = True

    @property
    def average(self) -> list[Fragment]:
        """The average by the network's names; views that the next update changes."""
        return list(self._named(self._average))

    @torch.no_grad()
    def update(self) -> None:
        """Add the weights after an optimizer step to the average."""
        self.updates += 1
        if self._joined:
            return
        masters = [f.value.detach() for f in self._fragments()]
        torch._foreach_lerp_([f.value for f in self._average], masters, 1.0 - self._decay(self.updates))

    @torch.no_grad()
    def load(self, full: Mapping[str, Tensor], updates: int) -> None:
        """Load this rank's fragments from full averages by name, saved on any number of ranks."""
        for name, start, value in self.average:
            value.copy_(full[name].flatten()[start : start + value.numel()])
        self.updates = updates
