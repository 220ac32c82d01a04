"""What the plan must know of the two players: how large they are, and how often an iteration passes through each."""

from dataclasses import dataclass
from typing import Literal

from torch import nn

from sadm_fast.config import Config

# "train": forward and backward. "forward": without a graph.
Pass = Literal["train", "forward"]


@dataclass(frozen=True)
class Player:
    """One network of the game; numbers are elements, not bytes."""

    name: str  # "denoiser" or "Psi"
    parameters: tuple[int, ...]  # of each parameter, trained or not
    trained: int
    passes: tuple[Pass, ...]  # through its engine's module in one iteration, in order; () without an engine
    traced: Pass  # the first pass of the run, which ZeRO-3 takes for what all of them need
    steps: int  # of its optimizer in one iteration
    backwards: int  # of its own loss in one iteration

    @property
    def everything(self) -> int:
        """All parameters."""
        return sum(self.parameters)

    @property
    def has_engine(self) -> bool:
        """Whether it is trained in this run; a fixed Psi is a plain module, the same on every rank."""
        return self.steps > 0


def players(config: Config, denoiser: nn.Module, psi: nn.Module | None) -> list[Player]:
    """The denoiser, and Psi where there is one, once the game is on; engine.Players.iteration is what is described."""
    turns = config.game.discriminator_steps if config.game.mode == "sadm" else 0
    micro_batches = config.train.grad_accumulation
    recomputed = turns * micro_batches if recomputes(config) else 0
    passes: dict[str, tuple[Pass, ...]] = {
        "denoiser": ("forward",) * recomputed + ("train",) * micro_batches,
        "Psi": ("train",) * (turns * micro_batches) + ("forward", "train") * micro_batches if turns else (),
    }

    def player(name: str, module: nn.Module) -> Player:
        steps = 1 if name == "denoiser" else turns
        first: Pass = "forward" if name == "denoiser" and recomputed and config.game.start_step == 0 else "train"
        return Player(
            name=name,
            parameters=tuple(p.numel() for p in module.parameters()),
            trained=sum(p.numel() for p in module.parameters() if p.requires_grad),
            passes=passes[name],
            traced=first,
            steps=steps,
            backwards=steps * micro_batches,
        )

    return [player("denoiser", denoiser)] + ([] if psi is None else [player("Psi", psi)])


def recomputes(config: Config) -> bool:
    """Whether the discriminator's step runs the denoiser anew, because its graph is not kept for both players."""
    return config.game.mode == "sadm" and (config.implementation == "reference" or config.train.grad_accumulation > 1)
