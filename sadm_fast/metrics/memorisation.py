"""Does a denoiser paint its training images again? Nearest training images of samples, in the judges' features.

How near is too near is told by images of the same distribution that were not trained on: of those, too, some lie near a
training image. Samples are copies where they lie nearer than such images do: C. Meehan, K. Chaudhuri, S. Dasgupta, "A
Non-Parametric Test to Detect Data-Copying in Generative Models", AISTATS 2020. Here over the whole space, without their
cells, and with a share of copies besides. Without held-out images, training images stand in for them, each compared
with the others: in theory the same distances, but a trained judge knows these images.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sadm_fast.config import Config
from sadm_fast.data.source import Source
from sadm_fast.feed import load_samples
from sadm_fast.generation import generate, to_images
from sadm_fast.metrics.evaluator import Evaluator
from sadm_fast.metrics.image_sets import evenly
from sadm_fast.metrics.judges import Judge
from sadm_fast.metrics.run_evaluation import FIRST_ID
from sadm_fast.models import Denoiser
from sadm_fast.models.autoencoder import Autoencoder
from sadm_fast.ranks.collectives import rank_and_world_size

LEVEL = 0.05  # share of the reference images that lie at least as near as the threshold
SHOWN = 10  # samples that are shown beside their neighbours
_QUERIES, _ROWS = 1024, 1 << 15  # of a block of distances: limits memory, changes no number

Progress = Callable[[str, int, int], None]  # what, done, total


class Nearest(NamedTuple):
    """For each query its nearest row: distances float64 [M], rows int64 [M]."""

    distances: Tensor
    rows: Tensor


class Copying(NamedTuple):
    """How near samples are to training images, beside reference images.

    Attributes:
        threshold: the LEVEL-quantile of the reference images' distances.
        copies: share of samples at most that far from a training image; LEVEL if they are like reference images.
        nearer: probability that a sample is nearer than a reference image, ties counted half; 0.5 if they are alike.
        deviations: of `nearer` from 0.5, in standard deviations of chance: Mann and Whitney's z. It has the opposite
            sign of the paper's Z_U: copying is positive here.
    """

    threshold: float
    copies: float
    nearer: float
    deviations: float


def nearest(queries: Tensor, rows: Tensor, own: Tensor | None = None) -> Nearest:
    """The Euclidean neighbour of each of `queries` [M, d] among `rows` [N, d].

    own: int64 [M], the row of each query itself, which does not count.
    """
    found = []
    for start in range(0, len(queries), _QUERIES):
        part = queries[start : start + _QUERIES].float()
        best = torch.full((len(part),), torch.inf, device=part.device)
        at = torch.zeros(len(part), dtype=torch.int64, device=part.device)
        for first in range(0, len(rows), _ROWS):
            distances = torch.cdist(part, rows[first : first + _ROWS].float())
            if own is not None:
                place = own[start : start + _QUERIES] - first
                here = (place >= 0) & (place < distances.shape[1])
                distances[here.nonzero()[:, 0], place[here]] = torch.inf
            least, index = distances.min(dim=1)
            at, best = torch.where(least < best, index + first, at), torch.minimum(least, best)
        # The products in cdist round; the distance of an image to itself must be 0.
        found.append(Nearest((part.double() - rows[at].double()).norm(dim=1), at))
    return Nearest(*map(torch.cat, zip(*found, strict=True)))


def copying(samples: Tensor, reference: Tensor) -> Copying:
    """Compare distances to the nearest training image of samples [M] with those of reference images [N]."""
    samples, reference = samples.double(), reference.double().sort().values
    m, n = len(samples), len(reference)
    threshold = torch.quantile(reference, LEVEL)
    beyond = n - 0.5 * (torch.searchsorted(reference, samples) + torch.searchsorted(reference, samples, right=True))
    nearer = float(beyond.sum() / (m * n))
    return Copying(
        threshold=float(threshold),
        copies=float((samples <= threshold).double().mean()),
        nearer=nearer,
        deviations=(nearer - 0.5) * (12 * m * n / (m + n + 1)) ** 0.5,
    )


class Memorisation(NamedTuple):
    """What `look_for_copies` found: `scores` by metric, and by metric the pictures of the nearest samples.

    pictures: images [2 P, C, H, W] in [-1, 1], P samples, the one nearest to a training image first, then the training
    image of each.
    """

    scores: dict[str, dict[str, Any]]
    pictures: dict[str, Tensor]


@torch.no_grad()
def look_for_copies(
    config: Config,
    model: Denoiser,
    judges: Sequence[Judge],
    training: Source,
    held_out: Source | None,
    classes: Sequence[int],
    device: torch.device,
    *,
    autoencoder: Autoencoder | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Memorisation:
    """Find the training image nearest to each of config.evaluate.samples samples. Collective.

    All training images pass through the judges, and the reference images: `held_out`, or evenly chosen training images,
    at most config.evaluate.real_images. The samples are those that evaluations score.

    Raises:
        ValueError: a feature is not finite.
    """
    evaluator = Evaluator([judge.to(device).eval() for judge in judges], {}, {}, device)
    evaluate = config.evaluate
    rank, world = rank_and_world_size()

    def pictures(images: Source, numbers: Sequence[int], what: str) -> Iterator[Tensor]:
        mine = numbers[rank::world]
        for start in range(0, len(mine), evaluate.batch):
            part = load_samples(config, images, mine[start : start + evaluate.batch])
            yield to_images(part.to(device), autoencoder)
            progress(what, min(len(numbers), (start + evaluate.batch) * world), len(numbers))

    def drawn(numbers: Tensor) -> Tensor:
        labels = torch.tensor(classes, device=device)[numbers % len(classes)]
        return to_images(
            generate(config, model, labels, numbers + FIRST_ID, steps=evaluate.steps, guidance_scale=1.0), autoencoder
        )

    def samples() -> Iterator[Tensor]:
        for numbers in torch.arange(rank, evaluate.samples, world, device=device).split(evaluate.batch):
            yield drawn(numbers)
            progress("samples", int(numbers[-1]) + 1, evaluate.samples)

    def features(images: Iterable[Tensor]) -> dict[str, Tensor]:
        found = evaluator.rows(images)
        for name, rows in found.items():
            if not bool(rows.isfinite().all()):
                raise ValueError(f"features of {name} are not finite: so are the images, or the judge's weights")
        return found

    known = features(pictures(training, range(len(training)), "training images"))
    of = training if held_out is None else held_out
    chosen = evenly(of, evaluate.real_images)
    own = torch.tensor(chosen, device=device) if held_out is None else None
    if own is None:
        reference = features(pictures(of, chosen, "held-out images"))
    else:
        reference = {name: rows[own] for name, rows in known.items()}
    painted = features(samples())

    scores, shown = {}, {}
    for name, rows in known.items():
        found = nearest(painted[name], rows)
        result = copying(found.distances, nearest(reference[name], rows, own).distances)
        closest = found.distances.argsort()[:SHOWN]
        neighbours = found.rows[closest].tolist()
        originals = to_images(load_samples(config, training, neighbours).to(device), autoencoder)
        shown[name] = torch.cat([drawn(closest), originals]).cpu()
        scores[name] = result._asdict() | {
            "nearest": [
                {"sample": int(sample), "image": image, "name": training.name(image), "distance": float(distance)}
                for sample, image, distance in zip(closest, neighbours, found.distances[closest], strict=True)
            ]
        }
    return Memorisation(scores, shown)
