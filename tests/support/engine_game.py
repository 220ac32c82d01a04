"""The players of one case of engine_cases.py under DeepSpeed, and what is asked of them after a step."""

import gc

from torch import Tensor

from sadm_fast.build import build_denoiser, build_psi
from sadm_fast.engine.masters import gather, local_masters, trainable_shapes
from sadm_fast.engine.players import Outcome, Players, gradient_norm
from sadm_fast.game import Batch
from sadm_fast.ranks.launch import Place
from tests.support.engine_cases import CLASSES, Case, micro_batch, see, starting_weights


class Game:
    """Players of one case, and what is asked of them after a step."""

    def __init__(self, case: Case, place: Place, seeds: tuple[int, int] = (1, 2)) -> None:
        # DeepSpeed collects garbage twice for an engine of stage 3: it need not search what is here before the game.
        gc.collect()
        gc.freeze()
        self.config, self.place = case.config, place
        denoiser, psi = build_denoiser(self.config, CLASSES), build_psi(self.config)
        starting_weights(denoiser, seeds[0])
        starting_weights(psi, seeds[1])
        self.shapes = {"denoiser": trainable_shapes(denoiser), "discriminator": trainable_shapes(psi)}
        self.players = Players(
            self.config, denoiser, psi if case.mode != "plain" else None, place.device, see if case.shown else None
        )

    def batches(self, iteration: int) -> list[Batch]:
        return [
            micro_batch(self.config, iteration, k, self.place.rank, self.place.world_size)
            for k in range(self.config.train.grad_accumulation)
        ]

    def play(self, iteration: int, batches: list[Batch] | None = None) -> Outcome:
        self.players.set_learning_rates(iteration)
        return self.players.iteration(self.batches(iteration) if batches is None else batches, iteration)

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """Full parameters by player, from the fp32 masters."""
        return {
            name: {k: v.clone() for k, v in gather(list(local_masters(engine)), self.shapes[name]).items()}
            for name, engine in self.players.engines.items()
        }

    @property
    def queued(self) -> int:
        """Samples in the feature queue."""
        columns = None if self.players.queue is None else self.players.queue.columns
        return 0 if columns is None else len(columns.real)

    def norms(self) -> dict[str, float | None]:
        return {name: gradient_norm(engine) for name, engine in self.players.engines.items()}
