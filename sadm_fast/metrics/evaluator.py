"""The evaluation of a run: real images and samples for the judges."""

from collections.abc import Iterator

import torch
from torch import Tensor

from sadm_fast.config import Config
from sadm_fast.data.source import Source
from sadm_fast.feed import load_samples
from sadm_fast.generation import generate
from sadm_fast.metrics.evaluation import Evaluator
from sadm_fast.metrics.judges import ClassifierJudge, judges_of
from sadm_fast.models import Denoiser
from sadm_fast.ranks.collectives import rank_and_world_size


def build_evaluator(config: Config, images: Source, judge: ClassifierJudge, device: torch.device) -> Evaluator:
    """Statistics of (an even choice of) the real images in the three feature spaces. Collective."""
    channels, resolution = config.data.channels, config.data.resolution
    rank, world = rank_and_world_size()
    stride = -(-len(images) // config.evaluate.real_images)
    mine = list(range(0, len(images), stride))[rank::world]
    real = (
        load_samples(config, images, mine[i : i + config.evaluate.batch])
        for i in range(0, len(mine), config.evaluate.batch)
    )
    return Evaluator.build(real, judges_of(channels, resolution, judge), seed=config.seed, device=device)


def evaluation_images(config: Config, model: Denoiser, num_classes: int, device: torch.device) -> Iterator[Tensor]:
    """This rank's share of the evaluation's samples, in batches; labels go round the classes.

    Sample i is the same whatever the number of ranks.
    """
    evaluate = config.evaluate
    rank, world = rank_and_world_size()
    for first in range(rank * evaluate.batch, evaluate.samples, world * evaluate.batch):
        ids = torch.arange(first, min(first + evaluate.batch, evaluate.samples), device=device)
        # Other starting noise than the grids': those are looked at, these are counted.
        yield generate(config, model, ids % num_classes, ids + (1 << 32), steps=evaluate.steps, guidance_scale=1.0)
