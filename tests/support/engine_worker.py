"""One rank of test_players.py and test_masters.py: plays every case and writes down what came out."""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn
from torch._dynamo.utils import counters

from sadm_fast.engine import players
from sadm_fast.engine.flat import network_of
from sadm_fast.engine.players import NotFinite
from sadm_fast.ranks.launch import Place, distributed
from tests.support.cuda_graphs import recorded_on_cpu
from tests.support.engine_cases import (
    BAD_PLAYER,
    ITERATIONS,
    Case,
    bad_gradient_cases,
    cases,
    poisoned_cases,
    stages,
    traced_cases,
)
from tests.support.engine_game import Game
from tests.support.engine_masters import masters


def gradient_left(module: nn.Module) -> float:
    """Largest magnitude in any .grad of the module; 0 without gradients."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None and p.grad.numel()]
    return max((float(gradient.abs().max()) for gradient in gradients), default=0.0)


def gradient_held(module: nn.Module, place: Place) -> float:
    """The same for what DeepSpeed keeps elsewhere: nothing after a step at stages 0-2, the last step's at stage 3.

    Asked on one rank only: with more, the question is collective, and ranks that own nothing of a parameter do not
    raise where the others do.
    """
    if place.world_size > 1:
        return 0.0
    try:
        gradients = [safe_get_full_grad(p) for p in module.parameters()]
    except ValueError:  # "Gradients are only available immediately after backward and before engine step"
        return 0.0
    return max((float(gradient.abs().max()) for gradient in gradients if gradient is not None), default=0.0)


def compared(case: Case, place: Place) -> dict[str, Any]:
    """ITERATIONS of a case; of a compiled one also the graphs made so far after each, and reasons for breaks."""
    torch._dynamo.reset()
    counters.clear()
    game = Game(case, place)
    found: dict[str, Any] = {"norms": [], "loss": [], "distance": [], "loss_discriminator": [], "graphs": []}
    for iteration in range(ITERATIONS):
        outcome = game.play(iteration)
        found["norms"].append(game.norms())
        found["loss"].append(outcome.loss_denoise)
        found["distance"].append(None if outcome.structure_distances is None else outcome.structure_distances.mean())
        found["loss_discriminator"].append(outcome.loss_discriminator)
        found["graphs"].append(counters["stats"]["unique_graphs"])
    found |= {"breaks": list(counters["graph_break"]), "not_compiled": game.players.not_compiled}
    return {**found, "weights": game.weights()}


def isolated(case: Case, place: Place) -> dict[str, Any]:
    """What is in a player's gradients before and after the other's backward and step."""
    game = Game(case, place)
    players = game.players
    found: dict[str, list[dict[str, float]]] = {"denoiser": [], "discriminator": []}

    def watch(engine: Any, other: str, module: nn.Module) -> None:
        backward, step = engine.backward, engine.step
        before: list[float] = []

        def watched_backward(loss: Tensor) -> None:
            before.append(gradient_held(module, place))
            backward(loss)

        def watched_step() -> None:
            step()
            found[other].append(
                {"left": gradient_left(module), "before": before.pop(), "after": gradient_held(module, place)}
            )

        engine.backward, engine.step = watched_backward, watched_step

    watch(players.discriminator, "denoiser", players.denoiser.module)
    watch(players.denoiser, "discriminator", players.psi)
    for iteration in range(2):
        game.play(iteration)
    return found


def interrupted(case: Case, place: Place) -> dict[str, Any]:
    """An exception in the middle of the denoiser's step: does Psi train afterwards?"""
    game = Game(case, place)

    def broken(*_: Any) -> Tensor:
        assert not any(p.requires_grad for p in game.players.psi.parameters()), "Psi is not frozen"
        raise ArithmeticError("in the denoiser's step")

    try:
        with mock.patch("sadm_fast.engine.players.structure_distance", broken):
            game.play(0)
        raised = False
    except ArithmeticError:
        raised = True
    return {"raised": raised, "asking": [p.requires_grad for p in game.players.psi.parameters()]}


def poisoned(case: Case, place: Place) -> dict[str, Any]:
    """A NaN in the images of the last rank's last micro-batch, then good batches."""
    game = Game(case, place)
    before = game.weights()
    bad = game.batches(0)
    if place.rank == place.world_size - 1:
        bad[-1].x0[0, 0, 3, 3] = torch.nan
    try:
        game.play(0, bad)
        raised = False
    except NotFinite:
        raised = True
    after = game.weights()
    for iteration in range(1, ITERATIONS):
        game.play(iteration)
    return {"raised": raised, "before": before, "after": after, "weights": game.weights()}


def bad_gradients(case: Case, place: Place) -> dict[str, Any]:
    """Finite denoising losses, and now and then a player's gradient that is NaN on the last rank.

    Gives for each iteration whether it was refused and whether it left every weight of both players as it was; the
    weights at the end, and those of players who never met the bad iterations.
    """
    spared = Game(case, place)
    for iteration, player in enumerate(BAD_PLAYER):
        if player is None:
            spared.play(iteration)
    game = Game(case, place)
    outcomes = []
    for iteration in range(len(BAD_PLAYER)):
        before = game.weights()
        with poison_of(BAD_PLAYER[iteration], last_rank=place.rank == place.world_size - 1):
            try:
                game.play(iteration)
                refused = False
            except NotFinite:
                refused = True
        after = game.weights()
        same = all(torch.equal(before[p][name], after[p][name]) for p in before for name in before[p])
        outcomes.append({"refused": refused, "same": same})
    return {
        "outcomes": outcomes,
        "weights": game.weights(),
        "spared": spared.weights(),
        "queued": (game.queued, spared.queued),
    }


def poison_of(player: str | None, last_rank: bool) -> Any:
    """A context in which that player's loss, beside what is voted on, is NaN on the last rank."""
    if player is None:
        return nullcontext()
    name = {"denoiser": "structure_distance", "discriminator": "discriminator_loss"}[player]
    real = getattr(players, name)

    def bad(*arguments: Any) -> Any:
        value = real(*arguments)
        if not last_rank:
            return value
        return value * torch.nan if isinstance(value, Tensor) else value._replace(distance=value.distance * torch.nan)

    return mock.patch(f"sadm_fast.engine.players.{name}", bad)


def traced(case: Case, place: Place) -> list[str]:
    """Ends of the blocks' backwards and starts of reductions, in their order in one iteration."""
    game = Game(case, place)
    events: list[str] = []
    for index, block in enumerate(network_of(game.players.denoiser.module).blocks):
        block.register_full_backward_hook(lambda *_, index=index: events.append(f"block {index}"))

    def seen(name: str) -> Any:
        real = getattr(deepspeed.comm, name)

        def reduce(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
            if tensor.numel() > 1:  # not a norm or a flag
                events.append("reduce")
            return real(tensor, *arguments, **options)

        return mock.patch.object(deepspeed.comm, name, reduce)

    with seen("reduce"), seen("all_reduce"):
        game.play(0)
    return events


def main(folder: Path) -> None:
    # Inductor takes a minute for what is the same graphs; the matrix is played with it.
    quickly = mock.patch.object(torch, "compile", partial(torch.compile, backend="aot_eager"))
    with distributed() as place, quickly, mock.patch("sadm_fast.engine.graphs.record", recorded_on_cpu):
        world_size = place.world_size
        by_stage = [
            Case(f"zero{stage}-accumulation{a}", "sadm", stage, a) for stage in stages(world_size) for a in (1, 2)
        ]
        asked: list[tuple[Callable[[Case, Place], Any], list[Case]]] = [
            (compared, cases(world_size)),
            (isolated, by_stage),
            (interrupted, by_stage[::2]),
            (poisoned, poisoned_cases(world_size)),
            (bad_gradients, bad_gradient_cases(world_size)),
            (traced, traced_cases(world_size)),
        ]
        found = {ask.__name__: {case.name: ask(case, place) for case in of} for ask, of in asked}
        found["masters"] = masters(place)
        torch.save(found, folder / f"rank-{place.rank}.pt")
        dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
