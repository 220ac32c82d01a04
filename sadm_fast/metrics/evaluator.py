"""Frechet distances of generated images to real ones, in the feature spaces of several judges.

A distance is named after its feature space, for example fid_classifier. It is never called "FID": that means
Inception-v3 features and 50,000 samples. It compares runs of this program with each other, and with its own floor.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sadm_fast.counters import Purpose, uniform
from sadm_fast.metrics.frechet import FeatureStatistics, frechet_distance
from sadm_fast.metrics.judges import Judge
from sadm_fast.metrics.scores import kernel_distance, precision_recall
from sadm_fast.ranks.collectives import rank_and_world_size, sum_over_ranks
from sadm_fast.scales import float_to_pixels, pixels_to_float

_BATCH = 256  # images that a judge sees at once: limits memory, changes no number


def _batches(images: Tensor | Iterable[Tensor]) -> Iterable[Tensor]:
    """Split one tensor [N, C, H, W], or each of an iterable of such, into batches of bounded size."""
    for tensor in [images] if isinstance(images, Tensor) else images:
        if tensor.ndim != 4 or not tensor.is_floating_point():
            raise ValueError(f"images {tuple(tensor.shape)} {tensor.dtype}: expected float [B, C, H, W] in [-1, 1]")
        yield from tensor.split(_BATCH)


class Evaluator:
    """Statistics of real images in each judge's feature space, and distances of other images to them.

    Args:
        judges: on `device`, in eval mode.
        real: statistics of the real images, by metric.
        floor: distances between two disjoint random halves of the real images, by metric: about what a perfect
            generator would reach. Both halves are finite, so it is above 0. The bias falls with the number of images:
            compare distances of equally many samples only.
        features: of the real images, float64 [N, feature_dim] by metric; None: kernel distances, precision and recall
            are not asked for.
    """

    def __init__(
        self,
        judges: Sequence[Judge],
        real: dict[str, FeatureStatistics],
        floor: dict[str, float],
        device: torch.device | str = "cpu",
        features: dict[str, Tensor] | None = None,
    ) -> None:
        self.judges = list(judges)
        self.features = features
        self.real = real
        self.floor = floor
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
    ) -> "Evaluator":
        """Pass the real images through the judges: one tensor [N, C, H, W] in [-1, 1], or an iterable of such.

        An image belongs to one of the floor's two halves by a coin of (seed, its place). Under torch.distributed each
        rank passes its own share of the images and gets the statistics of all. Raises ValueError if a half has fewer
        than two images (give at least a few dozen) or an image is not finite.

        detailed: keep the real images' features, so that `score` tells kernel distances, precision and recall as well.
        """
        kept: dict[str, list[Tensor]] = {judge.metric: [] for judge in judges}
        judges = [judge.to(device).eval() for judge in judges]
        # Each rank has 2^40 places of its own.
        place = rank_and_world_size()[0] << 40
        halves = [{j.metric: FeatureStatistics(j.feature_dim, device) for j in judges} for _ in range(2)]
        for images in _batches(real_images):
            coin = uniform(seed, Purpose.SPLIT, place + torch.arange(len(images)))[:, 0] < 0.5
            place += len(images)
            for name, features in _features(judges, images, device).items():
                first = coin.to(features.device)
                halves[0][name].update(features[first])
                halves[1][name].update(features[~first])
                if detailed:
                    kept[name].append(features.double())
        real, floor = {}, {}
        for name in halves[0]:
            for half in halves:
                half[name].all_reduce()
            floor[name] = frechet_distance(*halves[0][name].moments(), *halves[1][name].moments())
            real[name] = halves[0][name].merge(halves[1][name])
        return cls(judges, real, floor, device, _of_all_ranks(judges, kept, device) if detailed else None)

    def score(self, images: Tensor | Iterable[Tensor]) -> dict[str, Any]:
        """Measure the distances of images to the real ones: a tensor [N, C, H, W] in [-1, 1], or an iterable of such.

        Returns {metric: distance for each judge, "floor": {metric: floor}, "samples": N}; detailed, also {"kid":
        {metric: ...}, "precision": {metric: ...}, "recall": {metric: ...}}. Under torch.distributed each rank passes
        its own share; N counts all, and all ranks get the same. Images are rounded to 8 bits first, as the real ones
        are, so saved pictures have the same scores. Raises ValueError for fewer than two images (detailed: four).
        """
        kept: dict[str, list[Tensor]] = {judge.metric: [] for judge in self.judges}
        generated = {judge.metric: FeatureStatistics(judge.feature_dim, self.device) for judge in self.judges}
        for batch in _batches(images):
            for name, features in _features(self.judges, batch, self.device).items():
                generated[name].update(features)
                if self.features is not None:
                    kept[name].append(features.double())
        result: dict[str, Any] = {}
        samples = 0
        for name, statistics in generated.items():
            statistics.all_reduce()
            result[name] = frechet_distance(*statistics.moments(), *self.real[name].moments())
            samples = statistics.count
        details: dict[str, dict[str, float]] = {}
        if self.features is not None:
            details = {"kid": {}, "precision": {}, "recall": {}}
            for name, features in _of_all_ranks(self.judges, kept, self.device).items():
                details["kid"][name] = kernel_distance(features, self.features[name]).mean
                found = precision_recall(features, self.features[name])
                details["precision"][name], details["recall"][name] = found
        return {**result, "floor": dict(self.floor), "samples": samples, **details}


@torch.no_grad()
def _of_all_ranks(
    judges: Sequence[Judge], mine: Mapping[str, Sequence[Tensor]], device: torch.device | str
) -> dict[str, Tensor]:
    """This rank's features and those of all others, in the order of the ranks: float64 [N, feature_dim]. Collective."""
    rank, world = rank_and_world_size()
    together = {}
    for judge in judges:
        own = torch.cat([torch.zeros(0, judge.feature_dim, dtype=torch.float64, device=device), *mine[judge.metric]])
        counts = torch.zeros(world, dtype=torch.int64)
        counts[rank] = len(own)
        numbers = [int(n) for n in sum_over_ranks(counts).tolist()]
        everybody = own.new_zeros(sum(numbers), judge.feature_dim)
        first = sum(numbers[:rank])
        everybody[first : first + len(own)] = own
        together[judge.metric] = sum_over_ranks(everybody)
    return together


@torch.no_grad()
def _features(judges: Sequence[Judge], images: Tensor, device: torch.device | str) -> dict[str, Tensor]:
    """Compute each judge's features [B, feature_dim], by its metric."""
    images = images.to(device)
    # NaN has no 8-bit value. Keep it: a model that returns NaN must not be scored as one that paints a flat colour.
    pixels = pixels_to_float(float_to_pixels(images.nan_to_num()))
    images = torch.where(torch.isfinite(images), pixels, torch.nan)
    return {judge.metric: judge(images) for judge in judges}
