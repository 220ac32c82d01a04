"""Judges: feature spaces in which generated images are compared with real ones; none is the structure encoder's.

A judge maps images, float [B, C, H, W] in [-1, 1] of any size, to features, float32 [B, feature_dim]. It first reduces
large images, so that it costs the same at any resolution. A gain in one space that is a loss in another is not a gain.

To add a judge: write the class with its three texts, and name it in OWN and `judges_of`. Evaluations, the terminal,
TensorBoard and the report take names and texts from there.
"""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sadm_fast.counters import philox4x32

_LONGEST_SIDE = 64
_MOST_PIXEL_VALUES = 512
_RANDOM_JUDGE_KEY = (0x5ADF, 0x1F1D)

PROBABILITIES = "probabilities"  # what Judge.look calls those of the inception score


def bounded(images: Tensor, longest_side: int = _LONGEST_SIDE) -> Tensor:
    """Average images [B, C, H, W] down, in proportion, until no side is longer than longest_side; float32."""
    height, width = images.shape[-2:]
    longest = max(height, width)
    images = images.float()
    if longest <= longest_side:
        return images
    scale = longest_side / longest
    return F.adaptive_avg_pool2d(images, (max(1, round(height * scale)), max(1, round(width * scale))))


class Judge(nn.Module):
    """A feature space and what people read about it.

    Attributes:
        metric: name of its Frechet distance in evaluations.jsonl, on the terminal and in the report.
        space: what is compared, as part of a sentence.
        text: whose features these are, and what they notice: one or two sentences.
        feature_dim: length of a feature row.
        more_spaces: further spaces with a Frechet distance and no other score: length of a row by metric.
        classes: of its class probabilities, which give an inception score; 0: it tells none.
    """

    metric: ClassVar[str]
    space: ClassVar[str]
    text: ClassVar[str]
    feature_dim: int
    more_spaces: ClassVar[dict[str, int]] = {}
    classes: ClassVar[int] = 0

    @property
    def spaces(self) -> dict[str, int]:
        """Length of a row of every space with a Frechet distance, by metric."""
        return {self.metric: self.feature_dim, **self.more_spaces}

    def look(self, images: Tensor) -> dict[str, Tensor]:
        """All that it tells of images, in one pass: rows [B, d] of every space by metric, and PROBABILITIES."""
        return {self.metric: self(images)}


class MixerBlock(nn.Module):
    """Depthwise convolution with a skip connection, then a pointwise one: ConvMixer, Trockman and Kolter 2022."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, groups=width), nn.ReLU(), nn.BatchNorm2d(width)
        )
        self.pointwise = nn.Sequential(nn.Conv2d(width, width, 1), nn.ReLU(), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(x + self.depthwise(x))


class ClassifierJudge(Judge):
    """A small ConvMixer, which sees classes: 7x7 patches every 4 pixels, mixer blocks, global mean.

    sadm_fast.pretrain trains it on the real images. It is of another family than both Psis: patches, depthwise mixing
    and batch norm, where they have plain or residual convolutions and group norm. Scores come from eval mode, where
    batch norm mixes no images. Trained for 400 steps of 128 at lr 0.01 and decay 0.05, it is right on about 98% of
    held-out MNIST-5k digits.
    """

    metric = "fid_classifier"
    space = "the features of a classifier"
    text = (
        "Features of a classifier that was trained in this repository on the same real images, apart from Ψ. It notices"
        " wrong content."
    )

    def __init__(self, channels: int, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        self.feature_dim = width
        self.patches = nn.Sequential(
            nn.Conv2d(channels, width, 7, stride=4, padding=3), nn.ReLU(), nn.BatchNorm2d(width)
        )
        self.blocks = nn.Sequential(*[MixerBlock(width) for _ in range(depth)])

    def forward(self, images: Tensor) -> Tensor:
        """Compute features float32 [B, feature_dim] of images [B, C, H, W] in [-1, 1]."""
        # Channels last: depthwise convolutions on the CPU run about a third faster.
        x = bounded(images).contiguous(memory_format=torch.channels_last)
        return self.blocks(self.patches(x)).mean(dim=(2, 3))


def _fixed_filters(layer: int, channels_out: int, channels_in: int, size: int) -> Tensor:
    """Draw filters float32 [out, in, size, size] from Philox integers: the same on every machine.

    Uniform with He's variance 2 / fan_in. Each filter has zero mean, so that contrast passes and brightness does not:
    otherwise mean brightness would drown all else in deep random networks.
    """
    fan_in = channels_in * size * size
    index = torch.arange(channels_out * fan_in)
    zero = torch.zeros_like(index)
    word, *_ = philox4x32((index, zero + layer, zero, zero), _RANDOM_JUDGE_KEY)
    uniform = (word.double() + 0.5) * 2.0**-31 - 1.0
    filters = (uniform * math.sqrt(6.0 / fan_in)).view(channels_out, fan_in)
    return (filters - filters.mean(dim=1, keepdim=True)).view(channels_out, channels_in, size, size).float()


class RandomJudge(Judge):
    """Three random strided convolutions with ReLU, which see strokes, edges and textures; never trained.

    160 features: the mean of each channel of each layer over the image. Random networks rank generators much as trained
    ones do, and know no labels (Naeem et al. 2020, section 5).
    """

    metric = "fid_random"
    space = "the features of a random network"
    text = (
        "Features of a convolutional network with fixed random weights, which knows no classes. It notices texture and"
        " strokes."
    )

    def __init__(self, channels: int) -> None:
        super().__init__()
        widths = (32, 64, 64)
        self.feature_dim = sum(widths)
        channels_in = channels
        for layer, (width, size) in enumerate(zip(widths, (5, 3, 3), strict=True)):
            self.register_buffer(f"filters{layer}", _fixed_filters(layer, width, channels_in, size))
            channels_in = width

    def forward(self, images: Tensor) -> Tensor:
        """Compute features float32 [B, 160] of images [B, C, H, W] in [-1, 1]."""
        x = bounded(images)
        pooled = []
        for filters in self.buffers():
            x = F.relu(F.conv2d(x, filters, stride=2, padding=filters.shape[-1] // 2))
            pooled.append(x.mean(dim=(2, 3)))
        return torch.cat(pooled, dim=1)


class PixelJudge(Judge):
    """The image itself, averaged down by a whole factor to at most 512 values (14x14 for a 28x28 digit)."""

    metric = "fid_pixels"
    space = "pixels"
    text = "The pixels themselves. It notices brightness, position and contrast."

    def __init__(self, channels: int, height: int, width: int) -> None:
        super().__init__()
        factor = 1
        while channels * max(1, height // factor) * max(1, width // factor) > _MOST_PIXEL_VALUES:
            factor += 1
        self.size = (max(1, height // factor), max(1, width // factor))
        self.feature_dim = channels * self.size[0] * self.size[1]

    def forward(self, images: Tensor) -> Tensor:
        """Compute features float32 [B, feature_dim] of images [B, C, H, W] in [-1, 1]."""
        return F.adaptive_avg_pool2d(images.float(), self.size).flatten(1)


# By their names in evaluate.judges, in the order of the report.
OWN: dict[str, type[Judge]] = {"classifier": ClassifierJudge, "random": RandomJudge, "pixels": PixelJudge}
JUDGES = tuple(OWN.values())


def judges_of(channels: int, resolution: int, classifier: ClassifierJudge | None) -> list[Judge]:
    """Build the judges of a run on square images, one of each in JUDGES; `classifier` is the trained one, if any."""
    trained: list[Judge] = [] if classifier is None else [classifier]
    return [*trained, RandomJudge(channels), PixelJudge(channels, resolution, resolution)]
