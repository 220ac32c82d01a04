"""The evaluation of a run: its real images and its samples, handed to the Evaluator; in training and in evaluate.py."""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sadm_fast.config import Config
from sadm_fast.data.source import Source
from sadm_fast.errors import UserError
from sadm_fast.feed import load_samples
from sadm_fast.game import draw, predict
from sadm_fast.generation import generate, sampling_facts, to_images
from sadm_fast.metrics.evaluator import Evaluator, cost_of_judging, fewest_samples
from sadm_fast.metrics.image_sets import ImageSet, evenly
from sadm_fast.metrics.judges import OWN, ClassifierJudge, Judge, judges_of
from sadm_fast.metrics.pretrained import PRETRAINED, pretrained_judge
from sadm_fast.models import Denoiser
from sadm_fast.models.autoencoder import Autoencoder
from sadm_fast.ranks.collectives import max_over_ranks, rank_and_world_size, sum_over_ranks
from sadm_fast.run.loss_by_noise import LossByNoise, mean_losses

_GUIDANCE_SCALE = 1.0
# Starting noise that no grid has: grids are looked at, these samples are counted.
FIRST_ID = 1 << 32
FIRST_NOISE = 1 << 34  # noise and noise levels that no training sample has
_LOSS_IMAGES = 2048  # of which the denoising loss is measured: 512 in each part of the noise levels

Turn = Callable[[int], None]  # told how many samples are drawn, before each batch and on every rank


def chosen_judges(config: Config, classifier: ClassifierJudge | None) -> list[Judge]:
    """The judges of evaluate.judges, in that order. classifier: the trained one; None: without it.

    Raises:
        UserError: one is not known, or its weights cannot be had.
    """
    own = {type(judge): judge for judge in judges_of(config.data.channels, config.data.resolution, classifier)}
    found: list[Judge] = []
    for text in config.judges:
        name, _, file = text.partition("=")
        if name in PRETRAINED:
            found.append(pretrained_judge(name, file or None, "evaluate.judges="))
        elif name not in OWN or file:
            names = ", ".join([*OWN, *PRETRAINED])
            raise UserError(f"evaluate.judges={text}: must be one of {names}; the first three take no file")
        elif OWN[name] in own:
            found.append(own[OWN[name]])
    return found


def require_enough(judges: Sequence[Judge], samples: int, *, detailed: bool = False) -> None:
    """UserError unless so many samples can be scored."""
    if samples < (fewest := fewest_samples(judges, detailed=detailed)):
        raise UserError(f"evaluate.samples={samples}: too few to score; use at least {fewest}")


def judging(config: Config) -> tuple[int, int] | None:
    """Bytes that the judges of a run's evaluations hold, and most that they have alive besides; None: there are none.

    Raises:
        UserError: as `chosen_judges`.
    """
    if config.evaluate.every is None:
        return None
    data, evaluate = config.data, config.evaluate
    judges = chosen_judges(config, ClassifierJudge(data.channels))
    return cost_of_judging(judges, (data.channels, data.resolution, data.resolution), evaluate.batch)


class RunEvaluation:
    """Scores of a run's samples against its real images, at any of its steps, and its denoising loss by noise level.

    Args:
        images: the run's real images; evenly chosen ones are compared, config.evaluate.real_images at most. Or what is
            compared with instead, as a whole.
        classes: labels to draw samples of. Sample i is of classes[i mod len(classes)], whatever the number of ranks.
        autoencoder: of a run on latents, whose real and drawn latents it decodes.
        detailed: also kernel distances, precision and recall.
        losses: whether the denoising loss is measured; of images that the run was not trained on it has no meaning.
    """

    def __init__(
        self,
        config: Config,
        images: Source | ImageSet,
        judges: Sequence[Judge],
        classes: Sequence[int],
        device: torch.device,
        *,
        autoencoder: Autoencoder | None = None,
        detailed: bool = False,
        losses: bool = True,
    ) -> None:
        """Pass the real images through the judges. Collective: each rank takes its share of them.

        UserError: there are too few of them, or of samples; an image or a judge's feature of one is not finite.
        """
        self._config, self._classes, self._device = config, torch.tensor(classes, device=device), device
        self._autoencoder = autoencoder
        self._losses_of = images if losses and isinstance(images, Source) else None
        evaluate = config.evaluate
        require_enough(judges, evaluate.samples, detailed=detailed)
        rank, world = rank_and_world_size()
        if isinstance(images, ImageSet):
            real, self._reference = images.batches(rank, world, evaluate.batch), images.facts()
        else:
            chosen = evenly(images, evaluate.real_images)
            self._reference = {"of": images.where, "images": len(chosen), "fingerprint": images.fingerprint()}
            real = self._decoded(images, chosen[rank::world])
        try:
            published = images.moments if isinstance(images, ImageSet) else {}
            self._evaluator = Evaluator.build(
                real, judges, seed=config.seed, device=device, detailed=detailed, published=published
            )
        except ValueError as error:
            raise UserError(
                f"evaluate: {images.where}, {len(images)} images, cannot be compared with ({error}); use other images,"
                " or evaluate.every=null"
            ) from None

    def _decoded(self, images: Source, numbers: range) -> Iterator[Tensor]:
        size = self._config.evaluate.batch
        for start in range(0, len(numbers), size):
            samples = load_samples(self._config, images, numbers[start : start + size])
            yield to_images(samples.to(self._device), self._autoencoder)

    def rows(
        self,
        averages: Iterable[tuple[Denoiser, dict[str, Any]]],
        step: int,
        guidance: Sequence[float],
        *,
        steps: int | None = None,
        known: Sequence[dict[str, Any]] = (),
        turn: Turn | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Score each average at each guidance scale: `score`'s lines, one after the other. Collective.

        averages: each with what the record says of it.
        known: lines that are there already; they are left out.
        """
        for model, weights in averages:
            missing = [scale for scale in guidance if not self._is_in(known, scale, steps, weights)]
            losses = self.losses(model) if missing else {}
            for scale in missing:
                yield self.score(model, step, scale, weights, steps=steps, losses=losses, turn=turn)

    def _is_in(self, rows: Sequence[dict[str, Any]], scale: float, steps: int | None, weights: dict[str, Any]) -> bool:
        wanted = json.dumps([self._drawn(scale, steps), weights, self._config.evaluate.samples], sort_keys=True)
        return any(
            json.dumps([row.get("sampling"), row.get("weights"), row.get("samples")], sort_keys=True) == wanted
            and self._evaluator.floor.keys() <= row.keys()
            for row in rows
        )

    def score(
        self,
        model: Denoiser,
        step: int,
        guidance_scale: float = _GUIDANCE_SCALE,
        weights: dict[str, Any] | None = None,
        *,
        steps: int | None = None,
        losses: dict[str, float | None] | None = None,
        turn: Turn | None = None,
    ) -> dict[str, Any]:
        """Score samples of `model`, an averaged denoiser at `step`: one line of evaluations.jsonl. Collective.

        weights: what the record says of the model; None: that it is the run's own average, train.ema.
        steps: of the sampler; None: evaluate.steps.
        losses: of the model, if they are known.
        """
        losses = self.losses(model) if losses is None else losses
        started = time.perf_counter()
        scores = self._evaluator.score(self._samples(model, guidance_scale, steps, turn or (lambda _: None)))
        seconds = time.perf_counter() - started
        return {
            "step": step,
            **scores,
            **losses,
            "seconds": seconds,
            "images_per_s": scores.get("samples", 0) / seconds,
            "sampling": self._drawn(guidance_scale, steps),
            "weights": weights or {"ema": self._config.train.ema.model_dump(mode="json")},
            "reference": self._reference,
        }

    def _drawn(self, guidance_scale: float, steps: int | None) -> dict[str, Any]:
        """How samples are drawn, for the record."""
        config = self._config
        drawn = {"steps": steps or config.evaluate.steps, "guidance_scale": guidance_scale}
        return {
            **sampling_facts(config.model_copy(update={"sampling": config.sampling.model_copy(update=drawn)})),
            "labels": {"drawn": "in turn", "classes": len(self._classes)},
            "first_sample": FIRST_ID,
            "autoencoder": None if self._autoencoder is None else self._autoencoder.identity,
        }

    def _samples(self, model: Denoiser, guidance_scale: float, steps: int | None, turn: Turn) -> Iterator[Tensor]:
        """Draw this rank's share of the samples, as images in batches [B, C, H, W]."""
        evaluate = self._config.evaluate
        rank, world = rank_and_world_size()
        mine = torch.arange(rank, evaluate.samples, world, device=self._device)
        for start in range(0, -(-evaluate.samples // world), evaluate.batch):  # as often on every rank
            turn(start * world)
            if len(ids := mine[start : start + evaluate.batch]):
                yield self._images(model, ids, guidance_scale, steps)

    def _images(self, model: Denoiser, ids: Tensor, guidance_scale: float, steps: int | None) -> Tensor:
        labels = self._classes[ids % len(self._classes)]
        steps = steps or self._config.evaluate.steps
        drawn = generate(self._config, model, labels, ids + FIRST_ID, steps=steps, guidance_scale=guidance_scale)
        return to_images(drawn, self._autoencoder)

    @torch.no_grad()
    def losses(self, model: Denoiser) -> dict[str, float | None]:
        """Denoising losses of `model` by noise level, as metrics.jsonl has those of training. Collective.

        Of at most 2,048 evenly chosen real images, each with noise and a noise level of its own: the same at every step
        and of every average. {} where none are asked for.
        """
        images, config = self._losses_of, self._config
        if images is None:
            return {}
        found = LossByNoise(self._device)
        rank, world = rank_and_world_size()
        chosen = evenly(images, min(_LOSS_IMAGES, config.evaluate.real_images))
        places = np.arange(len(chosen))[rank::world]
        for start in range(0, len(places), config.evaluate.batch):
            which = places[start : start + config.evaluate.batch]
            numbers = np.asarray(chosen)[which]
            batch = draw(
                config.process,
                load_samples(config, images, numbers).to(self._device),
                torch.from_numpy(images.labels[numbers]).long().to(self._device),
                torch.from_numpy(which).to(self._device) + FIRST_NOISE,
                seed=config.seed,
                null_class=None,
                label_dropout=0.0,
            )
            found.add(batch.level, predict(config.process, model, batch).loss)
        return mean_losses(sum_over_ranks(found.sums).tolist())

    def rehearse(self, model: Denoiser, guidance_scale: float) -> float:
        """Draw and judge a batch, as `score` does; return about how many seconds it will take. Collective.

        ValueError on every rank: an image is not finite, or the model cannot be guided.
        """
        evaluate = self._config.evaluate
        rank, world = rank_and_world_size()
        started = time.perf_counter()
        ids = torch.arange(rank, evaluate.samples, world, device=self._device)[: evaluate.batch]
        good = not len(ids) or self._evaluator.can_judge(self._images(model, ids, guidance_scale, None))
        if max_over_ranks(torch.tensor(int(not good))):
            raise ValueError("an image, or what a judge makes of it, is not finite")
        taken = max_over_ranks(torch.tensor(time.perf_counter() - started, dtype=torch.float64))
        return float(taken) * -(-evaluate.samples // (world * evaluate.batch))
