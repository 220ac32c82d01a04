"""torch.compile of the players' blocks, where it works.

Each player is compiled in place, so its engine and the other player's step run the same code. Shapes never change in a
run, so they are taken as constants. A transformer's blocks are alike, so one graph serves them all: a depth of 28
compiles as fast as 1, and their gradients arrive block by block. What lies around them is left eager, and so is a
convolutional Psi: hardly two of its layers are alike, each of its three ways to be called would be a graph of all of
them, and these take longer to compile than the denoiser and run no faster (docs/training.md). The graphs are: a block
of the denoiser with gradient (and without, for accumulation's extra pass), a block of a transformer as Psi in its own
step, and frozen, over real and over xhat0. Nothing compiles after the first iteration of the game.
"""

from collections.abc import Sequence

import torch
from torch import nn

from sadm_fast.config import Config
from sadm_fast.errors import UserError
from sadm_fast.models import Denoiser, ViT


def check_compilation(config: Config) -> None:
    """Raise UserError if CUDA graphs are asked for and there is no CUDA device."""
    if config.train.compile == "graphs" and not torch.cuda.is_available():
        raise UserError("train.compile=graphs: needs a CUDA device, and there is none; use on")


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


def compile_in_place(network: nn.Module) -> None:
    """Compile the blocks of a network at their next call; of a denoiser without, all of it. Names do not change.

    Only `forward` is compiled: a block's hooks (engine/flat.py) run before it.
    """
    parts = blocks_of(network)
    if not parts and isinstance(network, Denoiser):
        parts = [network]
    for part in parts:
        part.forward = torch.compile(part.forward, fullgraph=True, dynamic=False)


def blocks_of(network: nn.Module) -> Sequence[nn.Module]:
    """The parts, alike, that a network calls one after another; none of a convolutional Psi, whose parts differ."""
    if isinstance(network, Denoiser):
        return network.units()
    return list(network.blocks) if isinstance(network, ViT) else []
