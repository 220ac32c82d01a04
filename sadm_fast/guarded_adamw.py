"""AdamW for fp32 without ZeRO, where DeepSpeed neither measures the gradient nor skips a step that is not finite."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class GuardedAdamW(torch.optim.AdamW):
    """Measures the gradient's norm, leaves the weights alone when it is not finite, and clips.

    The engine reads `overflow` and `_global_grad_norm` after a step, as it does from DeepSpeed's own wrappers. Its
    gradient_clipping must be 0 beside this, so that the norm is the one before clipping.

    Args:
        max_norm: largest norm of the gradient; 0 means no clipping.
    """

    def __init__(self, parameters: Iterable[Tensor], *, max_norm: float, **arguments: Any) -> None:
        super().__init__(parameters, **arguments)
        self.max_norm = max_norm
        self.overflow = False
        self._global_grad_norm: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, or none if a gradient is not finite."""
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        self._global_grad_norm = norm
        self.overflow = not math.isfinite(norm.item())
        if self.overflow:
            return None
        if self.max_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.max_norm, norm)
        return super().step(closure)
