"""What the players make of images that nobody trained on: denoising loss and S on training and on held-out batches."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sadm_fast.config import Config
from sadm_fast.counters import Purpose, uniform
from sadm_fast.data.source import Source
from sadm_fast.feed import load_samples
from sadm_fast.game import draw, predict, structure_distance
from sadm_fast.metrics.image_sets import evenly
from sadm_fast.metrics.run_evaluation import FIRST_NOISE
from sadm_fast.ranks.collectives import rank_and_world_size, sum_over_ranks

PASSES = 4  # over the held-out images, each with other noise
_FEWEST = 2  # batches, for an error


class Gap(NamedTuple):
    """Means over pairs of a training and a held-out batch, and of their difference with its standard error."""

    training: float
    held_out: float
    difference: float
    error: float
    batches: int


@torch.no_grad()
def gaps(
    config: Config,
    model: nn.Module,
    psi: Callable[[Tensor], Tensor] | None,
    training: Source,
    held_out: Source,
    device: torch.device,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Gap]:
    """ "loss", the denoising loss, and with `psi` "S", of batches of config.train.micro_batch images, at least 16.

    Collective: each rank takes its share of the batches, and all get the same.

    A held-out batch and the training batch beside it have the same noise, noise levels and classes; only the images
    differ. At most config.evaluate.real_images held-out images, PASSES times.

    Raises:
        ValueError: there are too few images for two batches.
    """
    pairs = _partners(training, held_out, config.evaluate.real_images, config.seed)
    size = min(max(16, config.train.micro_batch), len(pairs))
    starts = range(0, len(pairs) - size + 1, size)
    rank, world = rank_and_world_size()
    total = len(starts) * PASSES
    if len(pairs) < 2 or total < _FEWEST:
        raise ValueError(f"{len(pairs)} held-out images of classes that were trained on: too few to compare")
    names = ("loss",) if psi is None else ("loss", "S")
    found = torch.zeros(len(names), total, 2, dtype=torch.float64)
    for number in range(rank, total, world):
        start = starts[number % len(starts)]
        batch_pairs = pairs[start : start + size]
        ids = torch.arange(size, device=device) + (FIRST_NOISE + number * size)
        for side, (source, indices) in enumerate(zip((training, held_out), batch_pairs.T, strict=True)):
            x0 = load_samples(config, source, indices.numpy()).to(device)
            labels = torch.from_numpy(source.labels[indices.numpy()]).to(device)
            batch = draw(config.process, x0, labels, ids, seed=config.seed, null_class=None, label_dropout=0.0)
            prediction = predict(config.process, model, batch)
            found[0, number, side] = prediction.loss.mean()
            if psi is not None:
                of = structure_distance(config.comparison, config.process, psi, batch, prediction.xhat0)
                found[1, number, side] = of.distance
        progress(number + 1, total)
    return {name: _gap(values) for name, values in zip(names, sum_over_ranks(found), strict=True)}


def _partners(training: Source, held_out: Source, most: int, seed: int) -> Tensor:
    """Pairs (training image, held-out image) of one class, in an order that mixes classes: int64 [P, 2]."""
    chosen = torch.tensor(evenly(held_out, most))
    order = chosen[uniform(seed, Purpose.SPLIT, chosen)[:, 0].argsort()].tolist()
    members = {c: (training.labels == c).nonzero()[0] for c in training.filled}
    draw = uniform(seed, Purpose.SPLIT, torch.arange(len(held_out)) + len(held_out))[:, 0]
    pairs = [
        (int(of_class[int(draw[i] * len(of_class))]), i)
        for i in order
        if (of_class := members.get(int(held_out.labels[i]))) is not None
    ]
    return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)


def _gap(values: Tensor) -> Gap:
    """Of values [batches, 2], training and held-out."""
    difference = values[:, 1] - values[:, 0]
    error = float(difference.std() / len(difference) ** 0.5)
    training, held_out = values.mean(dim=0).tolist()
    return Gap(training, held_out, float(difference.mean()), error, len(values))
