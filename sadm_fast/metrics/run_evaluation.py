"""The evaluation of a run: its real images and its samples, handed to the Evaluator."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sadm_fast.config import Config
from sadm_fast.data.source import Source
from sadm_fast.errors import UserError
from sadm_fast.feed import load_samples
from sadm_fast.generation import generate, to_images
from sadm_fast.metrics.evaluator import Evaluator
from sadm_fast.metrics.judges import ClassifierJudge, Judge, judges_of
from sadm_fast.models import Denoiser
from sadm_fast.models.autoencoder import Autoencoder
from sadm_fast.ranks.collectives import rank_and_world_size

_GUIDANCE_SCALE = 1.0
# Starting noise that no grid has: grids are looked at, these samples are counted.
_FIRST_ID = 1 << 32


class RunEvaluation:
    """Frechet distances of a run's samples to its real images, at any of its steps.

    Args:
        images: the run's real images; evenly chosen ones are compared, config.evaluate.real_images at most.
        classifier: the trained judge; None: without it, for images that no classifier was trained on.
        classes: labels to draw samples of. Sample i is of classes[i mod len(classes)], whatever the number of ranks.
        autoencoder: of a run on latents, whose real and drawn latents it decodes.
        detailed: also kernel distances, precision and recall.
        more: judges beside the run's own.
    """

    def __init__(
        self,
        config: Config,
        images: Source,
        classifier: ClassifierJudge | None,
        classes: Sequence[int],
        device: torch.device,
        *,
        autoencoder: Autoencoder | None = None,
        detailed: bool = False,
        more: Sequence[Judge] = (),
    ) -> None:
        """Pass the real images through the judges. Collective: each rank takes its share of them.

        UserError: there are too few of them.
        """
        self._config, self._classes, self._device = config, torch.tensor(classes, device=device), device
        self._autoencoder = autoencoder
        data, evaluate = config.data, config.evaluate
        rank, world = rank_and_world_size()
        stride = -(-len(images) // evaluate.real_images)
        mine = list(range(0, len(images), stride))[rank::world]
        real = (
            to_images(load_samples(config, images, mine[i : i + evaluate.batch]).to(device), autoencoder)
            for i in range(0, len(mine), evaluate.batch)
        )
        judges = [*judges_of(data.channels, data.resolution, classifier), *more]
        try:
            self._evaluator = Evaluator.build(real, judges, seed=config.seed, device=device, detailed=detailed)
        except ValueError as error:
            raise UserError(
                f"evaluate: {images.where} has {len(images)} images, too few to compare with ({error});"
                " add images, or use evaluate.every=null"
            ) from None

    def score(self, model: Denoiser, step: int, guidance_scale: float = _GUIDANCE_SCALE) -> dict[str, Any]:
        """Score samples of `model`, the averaged denoiser at `step`: one line of evaluations.jsonl. Collective."""
        sampling = self._config.sampling.sampler
        sampler = {
            **({} if sampling == "auto" else {"name": sampling}),
            "steps": self._config.evaluate.steps,
            "guidance_scale": guidance_scale,
            "weights": "ema",
            "seed": self._config.seed,
        }
        return {"step": step, **self._evaluator.score(self._samples(model, guidance_scale)), "sampler": sampler}

    def _samples(self, model: Denoiser, guidance_scale: float) -> Iterator[Tensor]:
        """Draw this rank's share of the samples, as images in batches [B, C, H, W]."""
        config, evaluate = self._config, self._config.evaluate
        rank, world = rank_and_world_size()
        for first in range(rank * evaluate.batch, evaluate.samples, world * evaluate.batch):
            ids = torch.arange(first, min(first + evaluate.batch, evaluate.samples), device=self._device)
            labels = self._classes[ids % len(self._classes)]
            drawn = generate(
                config, model, labels, ids + _FIRST_ID, steps=evaluate.steps, guidance_scale=guidance_scale
            )
            yield to_images(drawn, self._autoencoder)


def one_line(scores: dict[str, Any]) -> str:
    """Print the distances of `RunEvaluation.score` for the terminal: "fid_classifier 1.23, ... of 2000 samples"."""
    found = ", ".join(f"{metric} {scores[metric]:.4g}" for metric in scores["floor"])
    return f"{found} of {scores['samples']} samples"


def table(rows: Sequence[dict[str, Any]], swept: Sequence[str]) -> str:
    """Scores as a table, one line for each of `rows`; the best of a column has a star.

    rows: of `RunEvaluation.score`, with a key for each name in `swept`.
    """
    metrics = list(rows[0]["floor"])
    columns: list[tuple[str, list[float], Any]] = [(metric, [row[metric] for row in rows], min) for metric in metrics]
    for detail, best in (("kid", min), ("precision", max), ("recall", max)):
        if detail in rows[0]:
            for metric in metrics:
                name = metric.removeprefix("fid_").removeprefix("fd_")
                columns.append((f"{detail}_{name}", [row[detail][metric] for row in rows], best))
    cells = [[*swept, *(name for name, _, _ in columns)]]
    for i, row in enumerate(rows):
        numbers = [f"{of[i]:.4g}" + ("*" if len(rows) > 1 and of[i] == best(of) else " ") for _, of, best in columns]
        cells.append([*(str(row[name]) for name in swept), *numbers])
    floors = [f"{rows[0]['floor'][metric]:.4g} " for metric in metrics]
    cells.append([*["floor", *[""] * (len(swept) - 1)][: len(swept)], *floors, *[""] * (len(columns) - len(floors))])
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join([*lines, f"{rows[0]['samples']} samples each; * the best of a column; floor: real against real"])
