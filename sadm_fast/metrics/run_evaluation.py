"""The evaluation of a run: its real images and its samples, handed to the Evaluator."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sadm_fast.config import Config
from sadm_fast.data.source import Source
from sadm_fast.errors import UserError
from sadm_fast.feed import load_samples
from sadm_fast.generation import generate
from sadm_fast.metrics.evaluator import Evaluator
from sadm_fast.metrics.judges import ClassifierJudge, judges_of
from sadm_fast.models import Denoiser
from sadm_fast.ranks.collectives import rank_and_world_size

_GUIDANCE_SCALE = 1.0
# Starting noise that no grid has: grids are looked at, these samples are counted.
_FIRST_ID = 1 << 32


class RunEvaluation:
    """Frechet distances of a run's samples to its real images, at any of its steps.

    Args:
        images: the run's real images; evenly chosen ones are compared, config.evaluate.real_images at most.
        classifier: the trained judge.
        classes: labels to draw samples of. Sample i is of classes[i mod len(classes)], whatever the number of ranks.
    """

    def __init__(
        self, config: Config, images: Source, classifier: ClassifierJudge, classes: Sequence[int], device: torch.device
    ) -> None:
        """Pass the real images through the judges. Collective: each rank takes its share of them.

        UserError: there are too few of them.
        """
        self._config, self._classes, self._device = config, torch.tensor(classes, device=device), device
        data, evaluate = config.data, config.evaluate
        rank, world = rank_and_world_size()
        stride = -(-len(images) // evaluate.real_images)
        mine = list(range(0, len(images), stride))[rank::world]
        real = (load_samples(config, images, mine[i : i + evaluate.batch]) for i in range(0, len(mine), evaluate.batch))
        judges = judges_of(data.channels, data.resolution, classifier)
        try:
            self._evaluator = Evaluator.build(real, judges, seed=config.seed, device=device)
        except ValueError as error:
            raise UserError(
                f"evaluate: {images.where} has {len(images)} images, too few to compare with ({error});"
                " add images, or use evaluate.every=null"
            ) from None

    def score(self, model: Denoiser, step: int) -> dict[str, Any]:
        """Score samples of `model`, the averaged denoiser at `step`: one line of evaluations.jsonl. Collective."""
        sampling = self._config.sampling.sampler
        sampler = {
            **({} if sampling == "auto" else {"name": sampling}),
            "steps": self._config.evaluate.steps,
            "guidance_scale": _GUIDANCE_SCALE,
            "weights": "ema",
            "seed": self._config.seed,
        }
        return {"step": step, **self._evaluator.score(self._samples(model)), "sampler": sampler}

    def _samples(self, model: Denoiser) -> Iterator[Tensor]:
        """Draw this rank's share of the samples, in batches [B, C, H, W]."""
        config, evaluate = self._config, self._config.evaluate
        rank, world = rank_and_world_size()
        for first in range(rank * evaluate.batch, evaluate.samples, world * evaluate.batch):
            ids = torch.arange(first, min(first + evaluate.batch, evaluate.samples), device=self._device)
            labels = self._classes[ids % len(self._classes)]
            yield generate(config, model, labels, ids + _FIRST_ID, steps=evaluate.steps, guidance_scale=_GUIDANCE_SCALE)


def one_line(scores: dict[str, Any]) -> str:
    """Print the distances of `RunEvaluation.score` for the terminal: "fid_classifier 1.23, ... of 2000 samples"."""
    found = ", ".join(f"{metric} {scores[metric]:.4g}" for metric in scores["floor"])
    return f"{found} of {scores['samples']} samples"
