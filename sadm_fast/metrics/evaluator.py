"""Frechet distances of generated images to real ones, in the feature spaces of several judges.

A distance is named after its feature space, for example fid_classifier. It is never called "FID": that means
Inception-v3 features and 50,000 samples. It compares runs of this program with each other, and with its own floor.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from sadm_fast.counters import Purpose, uniform
from sadm_fast.metrics.frechet import FeatureStatistics, frechet_distance
from sadm_fast.metrics.judges import Judge
from sadm_fast.ranks.collectives import rank_and_world_size
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
    """

    def __init__(
        self,
        judges: Sequence[Judge],
        real: dict[str, FeatureStatistics],
        floor: dict[str, float],
        device: torch.device | str = "cpu",
    ) -> None:
        self.judges = list(judges)
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
    ) -> "Evaluator":
        """Pass the real images through the judges: one tensor [N, C, H, W] in [-1, 1], or an iterable of such.

        An image belongs to one of the floor's two halves by a coin of (seed, its place). Under torch.distributed each
        rank passes its own share of the images and gets the statistics of all. Raises ValueError if a half has fewer
        than two images (give at least a few dozen) or an image is not finite.
        """
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
        real, floor = {}, {}
        for name in halves[0]:
            for half in halves:
                half[name].all_reduce()
            floor[name] = frechet_distance(*halves[0][name].moments(), *halves[1][name].moments())
            real[name] = halves[0][name].merge(halves[1][name])
        return cls(judges, real, floor, device)

    def score(self, images: Tensor | Iterable[Tensor]) -> dict[str, Any]:
        """Measure the distances of images to the real ones: a tensor [N, C, H, W] in [-1, 1], or an iterable of such.

        Returns {metric: distance for each judge, "floor": {metric: floor}, "samples": N}. Under torch.distributed each
        rank passes its own share; N counts all, and all ranks get the same. Images are rounded to 8 bits first, as the
        real ones are, so saved pictures have the same scores. Raises ValueError for fewer than two images.
        """
        generated = {judge.metric: FeatureStatistics(judge.feature_dim, self.device) for judge in self.judges}
        for batch in _batches(images):
            for name, features in _features(self.judges, batch, self.device).items():
                generated[name].update(features)
        result: dict[str, Any] = {}
        samples = 0
        for name, statistics in generated.items():
            statistics.all_reduce()
            result[name] = frechet_distance(*statistics.moments(), *self.real[name].moments())
            samples = statistics.count
        return {**result, "floor": dict(self.floor), "samples": samples}


@torch.no_grad()
def _features(judges: Sequence[Judge], images: Tensor, device: torch.device | str) -> dict[str, Tensor]:
    """Compute each judge's features [B, feature_dim], by its metric."""
    images = images.to(device)
    # NaN has no 8-bit value. Keep it: a model that returns NaN must not be scored as one that paints a flat colour.
    pixels = pixels_to_float(float_to_pixels(images.nan_to_num()))
    images = torch.where(torch.isfinite(images), pixels, torch.nan)
    return {judge.metric: judge(images) for judge in judges}
