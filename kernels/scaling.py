"""Powers of two that bring numbers near 1, where neither their squares nor their sums leave a float's range.

Dividing by one is exact, so a result that a common factor cannot change keeps every bit.
"""

import torch
from torch import Tensor


def power_of_two(size: Tensor) -> Tensor:
    """The largest power of two that is not above `size`, elementwise; 1 for 0, infinity and NaN. No gradient."""
    size = size.detach()
    mantissa = torch.frexp(size).mantissa  # in [0.5, 1)
    return torch.where((size > 0) & size.isfinite(), size / (2 * mantissa), 1.0)


def row_scale(x: Tensor) -> Tensor:
    """[B, 1]: by what each row of x [B, d] is divided to have its largest entry in [1, 2)."""
    return power_of_two(x.detach().abs().amax(dim=1, keepdim=True)) if x.shape[1] else x.new_ones(len(x), 1)


def common_scale(x: Tensor) -> Tensor:
    """0-d: by what x is divided to have its largest entry in [1, 2)."""
    return power_of_two(x.detach().abs().amax()) if x.numel() else x.new_ones(())


def share_of_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights [n] in `dtype`, scaled to a sum in [1, 2): S knows their ratios only, their scale may leave its range.

    With a process group or a queue, `weight` holds all columns' weights, so that all ranks divide by the same number.
    A weight below 1e-19 of the sum (float32) counts as 0 beside others as small.
    """
    weight = weight.to(torch.promote_types(weight.dtype, dtype))  # before what float32 cannot hold is lost
    weight = weight / common_scale(weight)
    return (weight / power_of_two(weight.sum())).to(dtype)


def weight_in_range(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights of any scale that does no harm: `share_of_weight` only where it is needed, if asking does not wait."""
    if weight.device.type == "cpu" and 1e-6 < float(weight.sum(dtype=torch.float64)) < 1e6:
        return weight.to(dtype)
    return share_of_weight(weight, dtype)
