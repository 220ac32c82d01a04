"""One step of training of each kind: `pytest benchmarks/test_training_step.py --benchmark-only`.

plain, structure and sadm, by the fast path (compiled) and by the reference (eager), as the trainer runs them: draw,
both players' turns, the average. Beside plain stands a tuned peer (tuned_peer.py). bf16, one rank. On a GPU it is
DiT-XL/2 at 256 pixels; on a CPU a small DiT. A quick look: steps of one kind run one after the other here; in
game_cost.py and dit_as_shipped.py they take turns.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from benchmarks import measure, tuned_peer
from benchmarks.latent_game import game_config, made_up_players, steady_iteration
from sadm_fast.ranks.launch import Place, distributed

GPU = torch.cuda.is_available()
SMALL = {"hidden_size": 192, "depth": 4, "num_heads": 3, "patch_size": 4, "num_classes": 1000}
SIZE: dict[str, Any] = {"denoiser": {"name": "DiT-XL/2", "num_classes": 1000}} if GPU else {"denoiser": SMALL}
MICRO_BATCH = 64 if GPU else 16
THREADS = 2
WARMUP = 3  # compiles, allocates the engines' buffers, settles a first iteration
WAYS = [(mode, way) for mode in ("plain", "structure", "sadm") for way in ("fast", "reference")]


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    measure.use_threads(THREADS)
    with distributed() as found:
        yield found


@pytest.mark.parametrize(("mode", "way"), [*WAYS, ("plain", "tuned peer")])
def test_step(benchmark: Any, place: Place, mode: str, way: str) -> None:
    fast = way == "fast"
    config = game_config(
        mode,
        micro_batch=MICRO_BATCH,
        implementation="fast" if way == "tuned peer" else way,
        train={"precision": "bf16", "compile": "on" if fast else "off"},
        zero_optimization={"stage": 1},
        **SIZE,
    )
    step: Callable[[], None]
    if way == "tuned peer":
        step = tuned_peer.iteration(config, place.device)
    else:
        step = steady_iteration(config, made_up_players(config, place.device))

    def finished() -> None:
        step()
        if GPU:
            torch.cuda.synchronize()

    for _ in range(WARMUP):
        finished()
    benchmark.group = f"{'DiT-XL/2' if GPU else 'a small DiT'}, {mode}, micro-batch {MICRO_BATCH}"
    benchmark.extra_info |= {"device": place.device.type, "threads": THREADS, "torch": torch.__version__}
    benchmark.pedantic(finished, rounds=7, iterations=1)
