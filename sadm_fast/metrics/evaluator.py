"""Scores of generated images against real ones, in the feature spaces of several judges.

A distance is named after its feature space, for example fid_classifier. Only fid_inception is the FID of papers
(sadm_fast.metrics.pretrained.published_name). Others compare runs of this program with each other, and with the floor.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sadm_fast.counters import Purpose, permutation, uniform
from sadm_fast.metrics.frechet import FeatureStatistics, frechet_distance
from sadm_fast.metrics.judges import PROBABILITIES, Judge
from sadm_fast.metrics.scores import NEIGHBOURS, SPLITS, inception_score, kernel_distance, precision_recall
from sadm_fast.planning.drawing import most_alive
from sadm_fast.ranks.collectives import rank_and_world_size, sum_over_ranks
from sadm_fast.scales import float_to_pixels, pixels_to_float

Moments = tuple[Tensor, Tensor]  # mean [d], covariance [d, d], float64

_BATCH = 256  # images that a judge sees at once: limits memory, changes no number


def _batches(images: Tensor | Iterable[Tensor]) -> Iterable[Tensor]:
    """Split one tensor [N, C, H, W], or each of an iterable of such, into batches of bounded size."""
    for tensor in [images] if isinstance(images, Tensor) else images:
        if tensor.ndim != 4 or not tensor.is_floating_point():
            raise ValueError(f"images {tuple(tensor.shape)} {tensor.dtype}: expected float [B, C, H, W] in [-1, 1]")
        yield from tensor.split(_BATCH)


def fewest_samples(judges: Sequence[Judge], *, detailed: bool) -> int:
    """How many samples the scores need at least: 2 for a covariance, one more than the neighbours of precision and
    recall, one in each split of the inception score.
    """
    return max(2, NEIGHBOURS + 1 if detailed else 0, *(SPLITS if judge.classes else 0 for judge in judges))


def cost_of_judging(judges: Sequence[Judge], shape: Sequence[int], count: int) -> tuple[int, int]:
    """Bytes that judges and their moments hold, and most that are alive besides while they look at `count` images."""
    weights = sum(x.numel() * x.element_size() for judge in judges for x in (*judge.parameters(), *judge.buffers()))
    moments = sum(2 * 8 * dim**2 for judge in judges for dim in judge.spaces.values())  # real and generated, float64

    def look(_: object) -> None:
        images = torch.empty(count, *shape)
        for batch in _batches(images):
            _features([judge.eval() for judge in judges], batch, "cpu")

    return weights + moments, most_alive(look)


class Evaluator:
    """Statistics of real images in each judge's feature spaces, and scores of other images against them.

    Under torch.distributed ranks take images in turn: rank r of W passes images r, r + W, r + 2 W, ... of the whole.
    So no score depends on the number of ranks, but for how sums round.

    Args:
        judges: on `device`, in eval mode.
        real: moments of the real images, by metric.
        floor: about what a perfect generator would reach, by metric: the distance between two disjoint random halves of
            the real images; where their moments are published ones, the distance of the images to those; None without
            images. Both sides are finite, so it is above 0. The bias falls with the number of images: compare distances
            of equally many samples only.
        features: of the real images, float32 [N, feature_dim] by metric; empty: kernel distances, precision and recall
            are not asked for, or there are no images.
    """

    def __init__(
        self,
        judges: Sequence[Judge],
        real: Mapping[str, Moments],
        floor: Mapping[str, float | None],
        device: torch.device | str = "cpu",
        features: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.judges = list(judges)
        self.features = dict(features or {})
        self.real = dict(real)
        self.floor = dict(floor)
        self.device = torch.device(device)

    @classmethod
    def build(
        cls,
        real_images: Tensor | Iterable[Tensor],
        judges: Sequence[Judge],
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        detailed: bool = False,
        published: Mapping[str, Moments] | None = None,
    ) -> "Evaluator":
        """Pass the real images through the judges: one tensor [N, C, H, W] in [-1, 1], or an iterable of such.

        An image belongs to one of the floor's two halves by a coin of (seed, its place in the whole). Raises ValueError
        if a half has fewer than two images (give at least a few dozen) or an image is not finite.

        detailed: keep the real images' features, so that `score` tells kernel distances, precision and recall as well.
        published: moments to compare with instead of the images', by metric. With them there need not be any images:
            spaces without moments are left out then, and so are judges without a space.
        """
        published = published or {}
        kept: dict[str, list[Tensor]] = {judge.metric: [] for judge in judges}
        judges = [judge.to(device).eval() for judge in judges]
        spaces = {metric: dim for judge in judges for metric, dim in judge.spaces.items()}
        halves = [{name: FeatureStatistics(dim, device) for name, dim in spaces.items()} for _ in range(2)]
        place, world = rank_and_world_size()
        for images in _batches(real_images):
            coin = uniform(seed, Purpose.SPLIT, place + world * torch.arange(len(images)))[:, 0] < 0.5
            place += world * len(images)
            for name, features in _features(judges, images, device).items():
                if name == PROBABILITIES:
                    continue
                first = coin.to(features.device)
                halves[0][name].update(features[first])
                halves[1][name].update(features[~first])
                if detailed and name in kept:
                    kept[name].append(features.float())
        real: dict[str, Moments] = {}
        floor: dict[str, float | None] = {}
        images_seen = 0
        for name in spaces:
            for half in halves:
                half[name].all_reduce()
            whole = halves[0][name].merge(halves[1][name])
            images_seen = whole.count
            if name in published:
                real[name] = published[name]
                floor[name] = frechet_distance(*whole.moments(), *real[name]) if images_seen else None
            elif images_seen or not published:
                floor[name] = frechet_distance(*halves[0][name].moments(), *halves[1][name].moments())
                real[name] = whole.moments()
        keep = detailed and images_seen > 0
        judges = [judge for judge in judges if judge.spaces.keys() & real.keys()]
        return cls(judges, real, floor, device, _of_all_ranks(kept, _widths(judges), device) if keep else None)

    def can_judge(self, images: Tensor) -> bool:
        """Whether all judges' features of images [N, C, H, W] are finite."""
        return all(
            bool(torch.isfinite(rows).all())
            for batch in _batches(images)
            for rows in _features(self.judges, batch, self.device).values()
        )

    def score(self, images: Tensor | Iterable[Tensor]) -> dict[str, Any]:
        """Score images against the real ones: a tensor [N, C, H, W] in [-1, 1], or an iterable of such.

        Returns {metric: distance for each space of each judge, "floor": {metric: floor}, "samples": N}; from a judge
        that tells class probabilities, also "inception_score" and "inception_score_std"; detailed, also {"kid":
        {metric: ...}, "precision": {metric: ...}, "recall": {metric: ...}}. N counts the images of all ranks, and all
        ranks get the same. Images are rounded to 8 bits first, as the real ones are, so saved pictures have the same
        scores. Raises ValueError for too few images (`fewest_samples`).
        """
        classes = max([0, *(judge.classes for judge in self.judges)])
        widths = {name: len(features[0]) for name, features in self.features.items()}
        widths |= {PROBABILITIES: classes} if classes else {}
        kept: dict[str, list[Tensor]] = {name: [] for name in widths}
        generated = {name: FeatureStatistics(len(mean), self.device) for name, (mean, _) in self.real.items()}
        for batch in _batches(images):
            for name, features in _features(self.judges, batch, self.device).items():
                if name in generated:
                    generated[name].update(features)
                if name in kept:
                    kept[name].append(features.float())
        result: dict[str, Any] = {}
        samples = 0
        for name, statistics in generated.items():
            statistics.all_reduce()
            result[name] = frechet_distance(*statistics.moments(), *self.real[name])
            samples = statistics.count
        result |= {"floor": dict(self.floor), "samples": samples}
        together = _of_all_ranks(kept, widths, self.device)
        if classes:
            probabilities = together.pop(PROBABILITIES)
            # Samples may lie in the order of their classes, where splits would hold a few classes each.
            mixed = permutation(0, 0, len(probabilities)).to(probabilities.device)
            result["inception_score"], result["inception_score_std"] = inception_score(probabilities[mixed])
        if self.features:
            details: dict[str, dict[str, float]] = {"kid": {}, "precision": {}, "recall": {}}
            for name, features in together.items():
                details["kid"][name] = kernel_distance(features, self.features[name]).mean
                found = precision_recall(features, self.features[name])
                details["precision"][name], details["recall"][name] = found
            result |= details
        return result

    def rows(self, images: Tensor | Iterable[Tensor]) -> dict[str, Tensor]:
        """Rows float32 [N, feature_dim] of the images of all ranks, in the order of the whole, by metric. Collective.

        images: a tensor [N, C, H, W] in [-1, 1], or an iterable of such; rounded to 8 bits as in `score`.
        """
        widths = _widths(self.judges)
        kept: dict[str, list[Tensor]] = {name: [] for name in widths}
        for batch in _batches(images):
            found = _features(self.judges, batch, self.device)
            for name, parts in kept.items():
                parts.append(found[name].float())
        return _of_all_ranks(kept, widths, self.device)


def _widths(judges: Sequence[Judge]) -> dict[str, int]:
    return {judge.metric: judge.feature_dim for judge in judges}


@torch.no_grad()
def _of_all_ranks(
    mine: Mapping[str, Sequence[Tensor]], widths: Mapping[str, int], device: torch.device | str
) -> dict[str, Tensor]:
    """This rank's rows and those of all others, in the order of the whole: float32 [N, width]. Collective.

    ValueError if the ranks have not taken the images in turn.
    """
    rank, world = rank_and_world_size()
    together = {}
    for name, parts in mine.items():
        own = torch.cat([torch.zeros(0, widths[name], device=device), *parts])
        counts = torch.zeros(world, dtype=torch.int64)
        counts[rank] = len(own)
        numbers = [int(n) for n in sum_over_ranks(counts).tolist()]
        if numbers != [len(range(first, sum(numbers), world)) for first in range(world)]:
            raise ValueError(f"ranks with {numbers} images have not taken them in turn")
        everybody = own.new_zeros(sum(numbers), widths[name])
        everybody[rank::world] = own
        together[name] = sum_over_ranks(everybody)
    return together


@torch.no_grad()
def _features(judges: Sequence[Judge], images: Tensor, device: torch.device | str) -> dict[str, Tensor]:
    """What the judges tell of a batch: rows [B, d], by metric, and PROBABILITIES."""
    images = images.to(device)
    # NaN has no 8-bit value. Keep it: a model that returns NaN must not be scored as one that paints a flat colour.
    pixels = pixels_to_float(float_to_pixels(images.nan_to_num()))
    images = torch.where(torch.isfinite(images), pixels, torch.nan)
    return {name: rows for judge in judges for name, rows in judge.look(images).items()}
