"""The sums of the steps since the last log line, reduced over ranks and written to metrics.jsonl."""

import resource
import time
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from sadm_fast.engine.players import Outcome
from sadm_fast.files import append_json
from sadm_fast.ranks.collectives import sum_over_ranks
from sadm_fast.run.folder import RunFolder

_QUARTILES = 4


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
        self._loss = torch.zeros(_QUARTILES, dtype=torch.float64, device=device)
        self._count = torch.zeros(_QUARTILES, dtype=torch.float64, device=device)
        # S summed where a pair counted, how often that was so and not so; -S of the discriminator, how often
        self._game = torch.zeros(5, dtype=torch.float64, device=device)

    def waited(self, seconds: float) -> None:
        """Add seconds spent waiting for data."""
        self._waited += seconds

    def add(self, outcome: Outcome) -> None:
        """Add an iteration that took place."""
        quartile = (outcome.level * _QUARTILES).long().clamp(max=_QUARTILES - 1)
        self._loss.index_add_(0, quartile, outcome.loss_denoise.double())
        self._count.index_add_(0, quartile, torch.ones_like(outcome.level, dtype=torch.float64))
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
        sums = torch.cat(
            [self._loss, self._count, self._game, self._loss.new_tensor([self._waited, 1.0, broken_images])]
        )
        values = sum_over_ranks(sums).tolist()
        loss, count, game, (waited, ranks, broken) = values[:4], values[4:8], values[8:13], values[13:]
        return {
            "loss_denoise": _ratio(sum(loss), sum(count)),
            **{f"loss_denoise_q{i + 1}": _ratio(loss[i], count[i]) for i in range(_QUARTILES)},
            "structure_distance": _ratio(game[0], game[1]),
            "structure_undefined": int(game[2]),
            "loss_discriminator": _ratio(game[3], game[4]),
            "samples_per_s": self._steps * samples_per_step / seconds,
            "data_wait_fraction": waited / ranks / seconds,
            "broken_images": int(broken),
        }


def _ratio(total: float, count: float) -> float | None:
    return total / count if count else None


class TrainingLog:
    """metrics.jsonl and TensorBoard; writes on rank 0 only."""

    def __init__(self, folder: RunFolder, rank: int, purge_step: int) -> None:
        self._folder = folder
        self._writer: SummaryWriter | None = None
        if rank == 0:
            self._writer = SummaryWriter(str(folder.tensorboard), purge_step=purge_step or None)

    def write(self, line: dict[str, Any]) -> None:
        """Write one logged step."""
        if self._writer is None:
            return
        append_json(self._folder.metrics, line)
        self._scalars("train", line)

    def write_evaluation(self, line: dict[str, Any]) -> None:
        """Write one evaluation."""
        if self._writer is None:
            return
        append_json(self._folder.evaluations, line)
        self._scalars("evaluation", line)

    def image(self, name: str, picture: Tensor, step: int) -> None:
        """Write a picture, uint8 [C, H, W], to TensorBoard."""
        if self._writer is not None:
            self._writer.add_image(name, picture, step)

    def _scalars(self, prefix: str, line: dict[str, Any]) -> None:
        assert self._writer is not None
        for key, value in line.items():
            if key != "step" and isinstance(value, int | float):
                self._writer.add_scalar(f"{prefix}/{key}", value, line["step"])

    def close(self) -> None:
        """Flush what TensorBoard has not written yet."""
        if self._writer is not None:
            self._writer.close()
