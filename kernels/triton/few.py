"""The loss of a micro-batch in three launches: pair weights and sums, S, and in the backward pass the gradients.

At a few hundred rows the time is that of launches and of Python, not of arithmetic. So the whole matrix of pair weights
is kept (at most 512 x 512 for each gradient), norms are formed again in each tile, and the gradient is one product of
them with the features, scaled and rounded to the features' dtype in the backward pass itself.
"""

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sadm_kernels.samples import Options, Samples
from sadm_kernels.triton import launch

ROWS = 512
# Tensor-core instructions without spills on every generation (aot.py).
BLOCK, BLOCK_D = 32, 64
BLOCK_K = {2: 64, 4: 16}  # by bytes a feature


class Forward(NamedTuple):
    """S, and what a backward pass needs beside the features."""

    loss: Tensor  # 0-d
    inverse: Tensor  # [1]: 1 / sum omega
    weights: Tensor  # [wanted inputs, T BLOCK, T BLOCK]
    lines: Tensor  # [wanted inputs, 2, T, T BLOCK]
    scales: Tensor  # [2, n]


def fits(batch: Samples, options: Options) -> bool:
    """Whether a batch without queue and group can go this way: few rows, alike, and no mean to be known beforehand."""
    real, fake, *_ = batch
    n, d = real.shape
    return (
        2 <= n <= ROWS
        and d > 0
        and real.shape == fake.shape
        and real.dtype == fake.dtype
        and real.dtype != torch.float64
        and (options.normalize != "mean" or options.relation == "cosine")
    )


def kernels_of(device: torch.device) -> ModuleType:
    """The module of these kernels. RuntimeError where there are none for `device`."""
    launch.machine_of(device)
    from sadm_kernels.triton import few_code

    return few_code


def _constants(real: Tensor, options: Options, needed: tuple[bool, bool]) -> dict[str, Any]:
    float32 = real.dtype == torch.float32
    return {
        "UNIT": options.unit,
        "CENTRE": float32 and options.relation != "cosine",
        "REAL": needed[0],
        "FAKE": needed[1],
        "BLOCK": BLOCK,
        "PRECISION": "tf32x3" if float32 else "ieee",  # see launch._start
        "enable_fp_fusion": False,  # see launch._launch
    }


def forward(batch: Samples, options: Options, needed: tuple[bool, bool], *, kernels: Any = None) -> Forward:
    """S of a batch that `fits`, made `alike`, and what `gradients` of the `needed` inputs takes. Two launches."""
    real, fake, weight, labels = batch
    n, d = real.shape
    kernels = kernels or kernels_of(real.device)
    across = -(-n // BLOCK)
    side = across * BLOCK
    wanted = needed[0] + needed[1]
    weights = torch.empty((wanted, side, side), dtype=real.dtype, device=real.device)
    # One allocation for all that is float32; S has its own, for its caller may change it in place.
    loss = torch.empty((), dtype=torch.float32, device=real.device)
    cut = (1, 2 * n, 2 * across * across, wanted * 2 * across * side)
    inverse, scales, partials, lines = torch.empty(sum(cut), dtype=torch.float32, device=real.device).split(cut)
    first, last = (weights[0], weights[-1]) if wanted else (weights, weights)
    lines = lines.view(wanted, 2, across, side)
    first_lines, last_lines = (lines[0], lines[-1]) if wanted else (lines, lines)
    block_k = min(BLOCK_K[real.element_size()], max(16, 1 << (d - 1).bit_length()))
    with launch.on_device(real.device):
        kernels.few_weights[(across, across)](
            real, fake, scales if weight is None else weight, scales if labels is None else labels,
            first, last, first_lines, last_lines, scales, partials, n, d, 0.5 / options.tau**2, options.delta,
            RELATION=options.relation, PENALTY=options.penalty, WEIGHTED=weight is not None,
            LABELLED=labels is not None, BLOCK_K=block_k, EVEN_K=d % block_k == 0, num_warps=8,
            **_constants(real, options, needed),
        )  # fmt: skip
        kernels.few_sums[(1,)](partials, loss, inverse, across * across, BLOCK=256, num_warps=1, enable_fp_fusion=False)
    return Forward(loss, inverse, weights, lines, scales)


def gradients(
    real: Tensor,
    fake: Tensor,
    options: Options,
    needed: tuple[bool, bool],
    state: Forward,
    upstream: Tensor,
    *,
    kernels: Any = None,
) -> list[Tensor | None]:
    """Gradients of real and fake, [n, d] in their dtype, for the gradient `upstream` (0-d float32) of S. One launch."""
    n, d = real.shape
    kernels = kernels or kernels_of(real.device)
    found = [torch.empty_like(x) if wanted else None for x, wanted in zip((real, fake), needed, strict=True)]
    places = [state.scales if x is None else x for x in found]
    block_d = min(BLOCK_D, max(16, 1 << (d - 1).bit_length()))
    with launch.on_device(real.device):
        kernels.few_gradient[(-(-n // BLOCK), -(-d // block_d), len(state.weights))](
            real, fake, state.weights[0], state.weights[-1], state.lines[0], state.lines[-1], state.scales,
            state.inverse, upstream, *places, n, d,
            BLOCK_D=block_d, EVEN_D=d % block_d == 0, num_warps=4, **_constants(real, options, needed),
        )  # fmt: skip
    return found
