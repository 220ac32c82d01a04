"""torch.compile of both players, where it works.

Each player is compiled in place, so its engine and the other player's step run the same code. Shapes never change in a
run, so they are taken as constants. The graphs are: the denoiser with gradient (and without, for accumulation's extra
pass), Psi in its own step, and Psi frozen, over real and over xhat0. Nothing compiles after the first
iteration of the game.
"""

from collections.abc import Iterable

import torch
from torch import nn


def why_not(stage: int, device: torch.device) -> str | None:
    """Why torch.compile cannot be used, as a clause for a message; None if compiling a tiny function succeeds."""
    if stage == 3:
        return "ZeRO stage 3 gathers weights in hooks that break the graph at every layer; use stage 2"
    try:
        torch.compile(lambda x: x.sin() + 1.0, fullgraph=True, dynamic=False)(torch.zeros(8, device=device))
    except Exception as error:  # whatever the backend of the day needs and does not find: a compiler, Triton, a driver
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return f"a trial failed: {reason[:200]}"
    return None


def compile_in_place(modules: Iterable[nn.Module]) -> None:
    """Compile the modules at their next call. Parameter names do not change."""
    for module in modules:
        module.compile(dynamic=False)
