"""What engine/graphs.py wants of CUDA graphs, on a CPU."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor


def recorded_on_cpu(*works: Callable[[], Any]) -> list[tuple[Callable[[], None], Any]]:
    """As engine.graphs.record: a replay computes anew, from what lies in the recorded inputs into the recorded outputs.

    So whoever keeps an output instead of a copy finds other values in it after the next replay, as on a device.
    """

    grad_mode = torch.is_grad_enabled()

    def again(work: Callable[[], Any], result: Any) -> None:
        with torch.set_grad_enabled(grad_mode):
            found = work()
        for old, new in zip(tensors(result), tensors(found), strict=True):
            old.copy_(new)

    recorded: list[tuple[Callable[[], None], Any]] = []
    for work in works:
        result = work()
        recorded.append((partial(again, work, result), result))
    return recorded


def tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)
