"""Other ways to drive DeepSpeed than engine/players.py has, against plain autograd: for docs/deepspeed.md, by hand.

    python -m tests.support.deepspeed_ways

prints the document's table for the installed version, on one and two CPU ranks. Each cell is the game in mode sadm, on
one micro-batch a step and on two: `ok` where all weights of both players are those of plain autograd after three steps.
With a row's number and a folder, it plays that row in this process, and shows what the errors say.
"""

import itertools
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest import mock

import deepspeed
import torch
from torch import Tensor

from sadm_fast.engine import players as engine_players
from sadm_fast.engine.players import Players
from sadm_fast.ranks.launch import distributed
from tests.engine.test_players import reference, weight_problems
from tests.support.engine_cases import ITERATIONS, STAGES, Case
from tests.support.engine_game import Game
from tests.support.ranks import run_ranks

WORLD_SIZES = (1, 2)

Backward = Callable[..., Any]  # an engine's


class Way(NamedTuple):
    """What is done differently."""

    what: str
    config: dict[str, Any] = {}  # over DeepSpeed's
    zero: dict[str, Any] = {}  # over its zero_optimization
    backward: Callable[[Backward, Tensor], None] = lambda backward, loss: backward(loss)
    steps: Literal["every", "last"] = "every"  # micro-batch
    change: Callable[[Players], None] = lambda players: None
    freeze: bool = True


def torch_backward(backward: Backward, loss: Tensor) -> None:
    loss.backward()


def twice(backward: Backward, loss: Tensor) -> None:
    backward(0.25 * loss, retain_graph=True)
    backward(0.75 * loss)


def through_engine(players: Players) -> None:
    players.psi = players.discriminator


def two_forwards(players: Players) -> None:
    engine = players.discriminator

    class Halves:
        def __call__(self, x: Tensor) -> Tensor:
            return torch.cat([engine(half) for half in x.chunk(2)])

        def __getattr__(self, name: str) -> Any:
            return getattr(engine, name)

    players.discriminator = Halves()


def deep_compile(players: Players) -> None:
    for engine in players.engines.values():
        engine.compile(backend="inductor")


UNMANAGED = {"managed_gradient_accumulation": False}
WAYS = [
    Way("as the engine does"),
    Way("`loss.backward()`, else as the engine does", backward=torch_backward),
    Way("the other player through its engine, frozen", change=through_engine),
    Way("the same, `loss.backward()`", change=through_engine, backward=torch_backward),
    Way("the other player through its engine, not frozen", change=through_engine, freeze=False),
    Way("the same, `loss.backward()`", change=through_engine, backward=torch_backward, freeze=False),
    Way("the other player through `.module`, not frozen", freeze=False),
    Way("the same, `loss.backward()`", backward=torch_backward, freeze=False),
    Way("two engine forwards a backward", change=two_forwards),
    Way("the same, `loss.backward()`", change=two_forwards, backward=torch_backward),
    Way("two backwards a step", backward=twice),
    Way("`managed_gradient_accumulation: false`", config=UNMANAGED, steps="last"),
    Way("the same, two backwards a step", config=UNMANAGED, backward=twice, steps="last"),
    Way("`reduce_scatter: false`", zero={"reduce_scatter": False}),
    Way("`use_multi_rank_bucket_allreduce: false`", zero={"use_multi_rank_bucket_allreduce": False}),
    Way("DeepCompile", config={"compile": {"deepcompile": True}}, change=deep_compile),
]


@contextmanager
def changed(way: Way) -> Iterator[None]:
    """Players as the way wants them, inside the block."""
    own = engine_players.deepspeed_dict

    def dictionary(*arguments: Any) -> dict[str, Any]:
        found = own(*arguments) | way.config
        return found | {"zero_optimization": found["zero_optimization"] | way.zero}

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(engine_players, "deepspeed_dict", dictionary))
        if not way.freeze:
            stack.enter_context(mock.patch.object(engine_players, "frozen", lambda psi: nullcontext()))
        yield


def drive(engine: Any, way: Way, accumulation: int) -> None:
    """Let the engine's two methods do what the way does."""
    backward, step = engine.backward, engine.step
    calls = itertools.count(1)

    def its_step() -> None:
        if next(calls) % accumulation == 0 or way.steps == "every":
            step()

    engine.backward, engine.step = partial(way.backward, backward), its_step


def played(way: Way, case: Case, place: Any) -> str:
    """One cell: ok, wrong, or the error."""
    try:
        with changed(way):
            game = Game(case, place)
            way.change(game.players)
            for engine in game.players.engines.values():
                drive(engine, way, case.accumulation)
            for iteration in range(ITERATIONS):
                game.play(iteration)
        return "wrong" if weight_problems(case, game.weights(), reference(case, place.world_size)) else "ok"
    except Exception as error:  # of whatever kind: that is the answer
        print(f"{way.what}: {case.name}: {type(error).__name__}: {error}", file=sys.stderr)
        return type(error).__name__


def row(number: int, world_size: int) -> list[str]:
    """A row's cells at one world size, from processes of its own: an error may leave DeepSpeed in any state."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            run_ranks("tests.support.deepspeed_ways", world_size, str(number), folder, timeout=400.0)
        except AssertionError as error:
            return [str(error).splitlines()[0]] * len(STAGES)
        cells: list[str] = torch.load(Path(folder) / "cells.pt", weights_only=True)
    return cells


def rank(number: int, folder: Path) -> None:
    cells = []
    with distributed() as place:
        for stage in STAGES:
            both = [played(WAYS[number], Case(f"zero{stage}-accumulation{a}", "sadm", stage, a), place) for a in (1, 2)]
            cells.append(both[0] if both[0] == both[1] else ", ".join(both))
        if place.rank == 0:
            torch.save(cells, folder / "cells.pt")


def main() -> None:
    print(f"DeepSpeed {deepspeed.__version__}, torch {torch.__version__}")
    print("| way | ranks | stage 0 | stage 1 | stage 2 | stage 3 |\n| --- " + "| --- " * 5 + "|")
    for number, way in enumerate(WAYS):
        for world_size in WORLD_SIZES:
            print(f"| {way.what} | {world_size} | " + " | ".join(row(number, world_size)) + " |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        rank(int(sys.argv[1]), Path(sys.argv[2]))
    else:
        main()
