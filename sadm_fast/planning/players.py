"""The two players as the plan sees them: their sizes, and how often an iteration passes through each."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sadm_fast.config import Config
from sadm_fast.models import Denoiser

# "train": forward and backward. "forward": without a graph.
Pass = Literal["train", "forward"]


class Node(NamedTuple):
    """A module of a network, as it is called."""

    own: tuple[int, ...]  # parameters that are its own, not its children's: indices into Player.parameters
    children: "tuple[Node, ...]"
    recomputed: bool = False  # its forward runs again before its backward: activation checkpointing


@dataclass(frozen=True)
class Player:
    """One network of the game; sizes in elements, not bytes."""

    name: str  # "denoiser" or "Psi"
    parameters: tuple[int, ...]  # of each parameter, trained or not
    tree: Node  # its modules as they are called
    trained: int
    passes: tuple[Pass, ...]  # through its engine's module in one iteration, in order; () without an engine
    traced: Pass  # the first pass of the run: ZeRO-3 learns from it what every pass needs
    steps: int  # of its optimizer in one iteration
    backwards: int  # of its own loss in one iteration

    @property
    def everything(self) -> int:
        """All parameters."""
        return sum(self.parameters)

    @property
    def has_engine(self) -> bool:
        """Whether this run trains it. A fixed Psi has no engine: it is a plain module, whole on every rank."""
        return self.steps > 0


def players(config: Config, denoiser: nn.Module, psi: nn.Module | None) -> list[Player]:
    """The denoiser, and Psi where there is one, both on meta: how engine.Players.iteration uses them in the game."""
    turns = config.game.discriminator_steps if config.game.mode == "sadm" else 0
    micro_batches = config.train.grad_accumulation
    recomputed = turns * micro_batches if recomputes(config) else 0
    forward: Pass = "forward"
    train: Pass = "train"
    passes = {
        "denoiser": (forward,) * recomputed + (train,) * micro_batches,
        "Psi": (train,) * (turns * micro_batches) + (forward, train) * micro_batches if turns else (),
    }

    def player(name: str, module: nn.Module, *inputs: Tensor) -> Player:
        steps = 1 if name == "denoiser" else turns
        first = forward if name == "denoiser" and recomputed and config.game.start_step == 0 else train
        return Player(
            name=name,
            parameters=tuple(p.numel() for p in module.parameters()),
            tree=_call_tree(module, *inputs),
            trained=sum(p.numel() for p in module.parameters() if p.requires_grad),
            passes=passes[name],
            traced=first,
            steps=steps,
            backwards=steps * micro_batches,
        )

    x = torch.empty(1, *config.sample_shape, device="meta")
    t, y = torch.empty(1, device="meta"), torch.zeros(1, dtype=torch.long, device="meta")
    seen = torch.empty(1, *config.psi_shape, device="meta")
    return [player("denoiser", denoiser, x, t, y)] + ([] if psi is None else [player("Psi", psi, seen)])


def _call_tree(module: nn.Module, *inputs: Tensor) -> Node:
    """Record which modules module(*inputs) calls, in order; module and inputs are on meta."""
    index = {parameter: i for i, parameter in enumerate(module.parameters())}
    checkpointed = set(module.units()) if isinstance(module, Denoiser) and module.activation_checkpointing else set()
    open_calls: list[list[Node]] = [[]]  # for each call that has begun and not ended: the calls inside it

    def enter(called: nn.Module, inputs: object) -> None:
        open_calls.append([])

    def leave(called: nn.Module, inputs: object, output: object) -> None:
        inside = tuple(open_calls.pop())
        own = tuple(index[p] for p in called.parameters(recurse=False))
        open_calls[-1].append(Node(own, inside, recomputed=called in checkpointed))

    hooks: list[RemovableHandle] = []
    for part in module.modules():
        hooks += [part.register_forward_pre_hook(enter), part.register_forward_hook(leave)]
    try:
        with torch.no_grad():
            module(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return open_calls[0][0]


def recomputes(config: Config) -> bool:
    """Return whether the discriminator's step runs the denoiser again; else both players share one forward pass."""
    return config.game.mode == "sadm" and (config.implementation == "reference" or config.train.grad_accumulation > 1)
