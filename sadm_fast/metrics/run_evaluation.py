"""The evaluation of a run: its real images and its samples, handed to the Evaluator."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sadm_fast.config import Config
from sadm_fast.data.source import Source
from sadm_fast.errors import UserError
from sadm_fast.feed import load_samples
from sadm_fast.generation import generate, sampling_facts, to_images
from sadm_fast.metrics.evaluator import Evaluator, fewest_samples
from sadm_fast.metrics.image_sets import ImageSet
from sadm_fast.metrics.judges import ClassifierJudge, Judge, judges_of
from sadm_fast.metrics.pretrained import published_name
from sadm_fast.models import Denoiser
from sadm_fast.models.autoencoder import Autoencoder
from sadm_fast.ranks.collectives import rank_and_world_size

_GUIDANCE_SCALE = 1.0
# Starting noise that no grid has: grids are looked at, these samples are counted.
_FIRST_ID = 1 << 32
_FLOOR = "floor: real images against real ones"


class RunEvaluation:
    """Frechet distances of a run's samples to its real images, at any of its steps.

    Args:
        images: the run's real images; evenly chosen ones are compared, config.evaluate.real_images at most. Or what is
            compared with instead, as a whole.
        classifier: the trained judge; None: without it, for images that no classifier was trained on.
        classes: labels to draw samples of. Sample i is of classes[i mod len(classes)], whatever the number of ranks.
        autoencoder: of a run on latents, whose real and drawn latents it decodes.
        detailed: also kernel distances, precision and recall.
        more: judges beside the run's own.
    """

    def __init__(
        self,
        config: Config,
        images: Source | ImageSet,
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
        if isinstance(images, ImageSet):
            real, self._reference = images.batches(rank, world, evaluate.batch), images.facts()
        else:
            chosen = range(0, len(images), -(-len(images) // evaluate.real_images))
            self._reference = {"of": images.where, "images": len(chosen), "fingerprint": images.fingerprint()}
            real = self._decoded(images, chosen[rank::world])
        judges = [*judges_of(data.channels, data.resolution, classifier), *more]
        if evaluate.samples < (fewest := fewest_samples(judges, detailed=detailed)):
            raise UserError(f"evaluate.samples={evaluate.samples}: too few to score; use at least {fewest}")
        try:
            published = images.moments if isinstance(images, ImageSet) else {}
            self._evaluator = Evaluator.build(
                real, judges, seed=config.seed, device=device, detailed=detailed, published=published
            )
        except ValueError as error:
            raise UserError(
                f"evaluate: {images.where} has {len(images)} images, too few to compare with ({error});"
                " add images, or use evaluate.every=null"
            ) from None

    def _decoded(self, images: Source, numbers: range) -> Iterator[Tensor]:
        size = self._config.evaluate.batch
        for start in range(0, len(numbers), size):
            samples = load_samples(self._config, images, numbers[start : start + size])
            yield to_images(samples.to(self._device), self._autoencoder)

    def score(
        self,
        model: Denoiser,
        step: int,
        guidance_scale: float = _GUIDANCE_SCALE,
        weights: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Score samples of `model`, the averaged denoiser at `step`: one line of evaluations.jsonl. Collective.

        weights: what the record says of the model; None: that it is the run's own average, train.ema.
        """
        config = self._config
        drawn = {"steps": config.evaluate.steps, "guidance_scale": guidance_scale}
        drawn_so = config.model_copy(update={"sampling": config.sampling.model_copy(update=drawn)})
        return {
            "step": step,
            **self._evaluator.score(self._samples(model, guidance_scale)),
            "sampling": {
                **sampling_facts(drawn_so),
                "labels": {"drawn": "in turn", "classes": len(self._classes)},
                "first_sample": _FIRST_ID,
                "autoencoder": None if self._autoencoder is None else self._autoencoder.identity,
            },
            "weights": weights or {"ema": config.train.ema.model_dump(mode="json")},
            "reference": self._reference,
        }

    def _samples(self, model: Denoiser, guidance_scale: float) -> Iterator[Tensor]:
        """Draw this rank's share of the samples, as images in batches [B, C, H, W]."""
        config, evaluate = self._config, self._config.evaluate
        rank, world = rank_and_world_size()
        for ids in torch.arange(rank, evaluate.samples, world, device=self._device).split(evaluate.batch):
            labels = self._classes[ids % len(self._classes)]
            drawn = generate(
                config, model, labels, ids + _FIRST_ID, steps=evaluate.steps, guidance_scale=guidance_scale
            )
            yield to_images(drawn, self._autoencoder)


def one_line(scores: dict[str, Any]) -> str:
    """Print the distances of `RunEvaluation.score` for the terminal: "fid_classifier 1.23, ... of 2000 samples"."""
    found = ", ".join(f"{published_name(metric, scores['samples'])} {scores[metric]:.4g}" for metric in scores["floor"])
    return f"{found} of {scores['samples']} samples"


def table(rows: Sequence[dict[str, Any]], swept: Sequence[str]) -> str:
    """Scores as a table, one line for each of `rows`; the best of a column has a star.

    rows: of `Evaluator.score`, with a key for each name in `swept`.
    """
    columns: list[tuple[str, list[float], Any]] = []
    for metric in rows[0]["floor"]:
        columns.append((published_name(metric, rows[0]["samples"]), [row[metric] for row in rows], min))
    if "inception_score" in rows[0]:
        columns.append(("IS", [row["inception_score"] for row in rows], max))
    for detail, best in (("kid", min), ("precision", max), ("recall", max)):
        for metric in rows[0].get(detail, ()):
            columns.append((f"{detail}_{_space(metric)}", [row[detail][metric] for row in rows], best))
    cells = [[*swept, *(name for name, _, _ in columns)]]
    for i, row in enumerate(rows):
        numbers = [f"{of[i]:.4g}" + ("*" if len(rows) > 1 and of[i] == best(of) else " ") for _, of, best in columns]
        cells.append([*(str(row[name]) for name in swept), *numbers])
    floors = ["" if floor is None else f"{floor:.4g} " for floor in rows[0]["floor"].values()]
    cells.append([*["floor", *[""] * (len(swept) - 1)][: len(swept)], *floors, *[""] * (len(columns) - len(floors))])
    return "\n".join([_aligned(cells), f"{rows[0]['samples']} samples each; * the best of a column; {_FLOOR}"])


def summary(row: dict[str, Any]) -> str:
    """Scores of one set of samples as a table, one line for each feature space. row: of `Evaluator.score`."""
    cells = [["", "distance", "floor", "KID", "precision", "recall"]]
    for metric, floor in row["floor"].items():
        values = [row[metric], floor, *(row.get(of, {}).get(metric) for of in ("kid", "precision", "recall"))]
        numbers = ["" if value is None else f"{value:.4g}" for value in values]
        cells.append([published_name(metric, row["samples"]), *numbers])
    if "inception_score" in row:
        cells.append(["IS", f"{row['inception_score']:.4g}", *[""] * 4])
    return "\n".join([_aligned(cells), f"{row['samples']} samples; {_FLOOR}"])


def _space(metric: str) -> str:
    return metric.removeprefix("fid_").removeprefix("fd_")


def _aligned(cells: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join(lines)
