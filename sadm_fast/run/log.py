"""The sums of the steps since the last log line, reduced over ranks and written to metrics.jsonl."""

import resource
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sadm_fast.engine.players import Outcome
from sadm_fast.files import append_json
from sadm_fast.ranks.collectives import sum_over_ranks
from sadm_fast.run.folder import RunFolder
from sadm_fast.run.loggers import Logger
from sadm_fast.run.loss_by_noise import LossByNoise, mean_losses, ratio


def peak_memory(device: torch.device) -> int:
    """Peak bytes this rank has used: of the GPU where there is one, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Interval:
    """Sums over the steps since the last line; stays on the device until `reduce`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._started = time.perf_counter()
        self._waited = 0.0
        self._steps = 0
        self._losses = LossByNoise(device)
        # S summed where a pair counted, how often that was so and not so; -S of the discriminator, how often
        self._game = torch.zeros(5, dtype=torch.float64, device=device)

    def waited(self, seconds: float) -> None:
        """Add seconds spent waiting for data."""
        self._waited += seconds

    def add(self, outcome: Outcome) -> None:
        """Add an iteration that took place."""
        self._losses.add(outcome.level, outcome.loss_denoise)
        if outcome.structure_distances is not None:
            compared = outcome.structure_distances != 0
            self._game[0] += outcome.structure_distances.double().sum()
            self._game[1] += compared.sum()
            self._game[2] += (~compared).sum()
        if outcome.loss_discriminator is not None:
            self._game[3] += outcome.loss_discriminator.double()
            self._game[4] += 1

    def step_done(self) -> None:
        """Count an iteration, taken or skipped."""
        self._steps += 1

    def reduce(self, samples_per_step: int, broken_images: int) -> dict[str, float | int | None]:
        """Means over samples, steps and ranks; times of this interval; broken images of all ranks. Collective.

        structure_distance: mean over the micro-batches in which a pair counted; structure_undefined: how many others.
        """
        seconds = time.perf_counter() - self._started
        mine = self._losses.sums
        rest = mine.new_tensor([self._waited, 1.0, broken_images])
        values = sum_over_ranks(torch.cat([mine.flatten(), self._game, rest])).tolist()
        loss, count, game, (waited, ranks, broken) = values[:4], values[4:8], values[8:13], values[13:]
        return {
            **mean_losses([loss, count]),
            "structure_distance": ratio(game[0], game[1]),
            "structure_undefined": int(game[2]),
            "loss_discriminator": ratio(game[3], game[4]),
            "samples_per_s": self._steps * samples_per_step / seconds,
            "data_wait_fraction": waited / ranks / seconds,
            "broken_images": int(broken),
        }


class TrainingLog:
    """metrics.jsonl, evaluations.jsonl and the run's loggers; writes where there are loggers: on rank 0."""

    def __init__(self, folder: RunFolder, writing: bool, loggers: Sequence[Logger] = ()) -> None:
        self._folder, self._writing, self._loggers = folder, writing, loggers

    def write(self, line: dict[str, Any]) -> None:
        """Write one logged step."""
        if self._writing:
            append_json(self._folder.metrics, line)
            self._scalars("train", line)

    def write_evaluation(self, line: dict[str, Any], name: str = "evaluation") -> None:
        """Write a line of scores. name: what its numbers stand below in the loggers."""
        if self._writing:
            append_json(self._folder.evaluations, line)
            self._scalars(name, line)

    def image(self, name: str, picture: Tensor, step: int) -> None:
        """Show a picture, uint8 [C, H, W]."""
        for logger in self._loggers:
            logger.image(name, picture, step)

    def _scalars(self, prefix: str, line: dict[str, Any]) -> None:
        values = {
            f"{prefix}/{key}": value for key, value in line.items() if key != "step" and isinstance(value, int | float)
        }
        for logger in self._loggers:
            logger.scalars(values, line["step"])

    def close(self) -> None:
        """Flush what the loggers have not written yet."""
        for logger in self._loggers:
            logger.close()
