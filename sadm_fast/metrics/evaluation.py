"""Frechet distances of generated images to the real ones, in several feature spaces at once.

The numbers are named after their feature space (fid_classifier, fid_random, fid_pixels) and never "FID",
which means Inception-v3 features and 50,000 samples. They compare runs of this program with each other and
with their own floor.
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

_BATCH = 256  # images a judge sees at once: bounds the memory, changes no number


def _batches(images: Tensor | Iterable[Tensor]) -> Iterable[Tensor]:
    """Batches of bounded size, of one tensor [N, C, H, W] or of a stream of such."""
    for tensor in [images] if isinstance(images, Tensor) else images:
        if tensor.ndim != 4 or not tensor.is_floating_point():
            raise ValueError(f"images {tuple(tensor.shape)} {tensor.dtype}: expected float [B, C, H, W] in [-1, 1]")
        yield from tensor.split(_BATCH)


class Evaluator:
    """Real images' statistics in each judge's feature space, and the distances of other images to them.

    judges: on `device`, in eval mode (sadm_fast.metrics.judges). `floor` is what a perfect generator would
    about reach: the distances between two disjoint random halves of the real images. It is not zero, because
    both halves are finite samples: the bias falls with the number of images, so compare numbers of the same
    `samples` only.
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
        """Pass the real images, one tensor [N, C, H, W] in [-1, 1] or a stream of such, through the judges
        once.

        Each image goes to one of the two halves of the floor by a coin of (seed, its place in the stream).
        Under torch.distributed each rank passes its own share of the images and gets the statistics of all.
        Raises ValueError when a half has fewer than two images (give at least a few dozen) or an image is not
        finite.
        """
        judges = [judge.to(device).eval() for judge in judges]
        # Places of different ranks never meet: 2^40 images a rank.
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
        """Distances of images (a tensor [N, C, H, W] in [-1, 1] or a stream of such) to the real ones.

        Returns {"fid_classifier": ..., "fid_random": ..., "fid_pixels": ..., "floor": {the same names},
        "samples": N}. Under torch.distributed each rank passes its share, N counts all and the result is the
        same on all ranks. Images are rounded to 8 bits first, as the real ones are, so that scores equal
        those of the saved pictures. Raises ValueError for fewer than two images.
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
    """Features [B, d] of each judge, by its metric's name."""
    images = images.to(device)
    # NaN has no 8-bit value: keep it, or a failed model would be scored as one that paints a flat colour.
    pixels = pixels_to_float(float_to_pixels(images.nan_to_num()))
    images = torch.where(torch.isfinite(images), pixels, torch.nan)
    return {judge.metric: judge(images) for judge in judges}
