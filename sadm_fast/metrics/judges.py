"""Three feature spaces to judge generated images in, none of which is the structure encoder's.

All take images float [B, C, H, W] in [-1, 1], of any size, to features float32 [B, feature_dim], and first
bring the images to a bounded size, so that a judge costs the same at any resolution:
- ClassifierJudge sees classes. Trained on the real images by sadm_fast.pretrain; of another family than both
  Psis (patches and depthwise mixing with batch norm, against plain and residual convolutions with group
  norm).
- RandomJudge sees strokes, edges and textures. Never trained, the same weights for ever.
- PixelJudge sees brightness and where it is.
A gain in one space that is a loss in another is not a gain.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sadm_fast.counters import philox4x32

_LONGEST_SIDE = 64
_MOST_PIXEL_VALUES = 512
_RANDOM_JUDGE_KEY = (0x5ADF, 0x1F1D)


def bounded(images: Tensor, longest_side: int = _LONGEST_SIDE) -> Tensor:
    """Images [B, C, H, W] as float32, averaged down in proportion if a side is longer than longest_side."""
    height, width = images.shape[-2:]
    longest = max(height, width)
    images = images.float()
    if longest <= longest_side:
        return images
    scale = longest_side / longest
    return F.adaptive_avg_pool2d(images, (max(1, round(height * scale)), max(1, round(width * scale))))


class Judge(nn.Module):
    """What an evaluator needs of a feature space: the name of its number and the length of its features."""

    metric: str
    feature_dim: int


class MixerBlock(nn.Module):
    """Depthwise convolution with a skip, then a pointwise one: ConvMixer, Trockman and Kolter 2022."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, groups=width), nn.ReLU(), nn.BatchNorm2d(width)
        )
        self.pointwise = nn.Sequential(nn.Conv2d(width, width, 1), nn.ReLU(), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(x + self.depthwise(x))


class ClassifierJudge(Judge):
    """A small ConvMixer: overlapping patches of 7x7 every 4 pixels, mixer blocks, global mean; [B, width]
    features.

    In train mode batch norm uses the batch's statistics; scores come from eval mode, where images do not mix.
    Trained for 400 steps of 128 at lr 0.01 and decay 0.05 it knows about 98% of held-out MNIST-5k digits.
    """

    metric = "fid_classifier"

    def __init__(self, channels: int, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        self.feature_dim = width
        self.patches = nn.Sequential(
            nn.Conv2d(channels, width, 7, stride=4, padding=3), nn.ReLU(), nn.BatchNorm2d(width)
        )
        self.blocks = nn.Sequential(*[MixerBlock(width) for _ in range(depth)])

    def forward(self, images: Tensor) -> Tensor:
        """Features float32 [B, feature_dim] of images [B, C, H, W] in [-1, 1]."""
        # Channels last: depthwise convolutions on the CPU run about a third faster.
        x = bounded(images).contiguous(memory_format=torch.channels_last)
        return self.blocks(self.patches(x)).mean(dim=(2, 3))


def _fixed_filters(layer: int, channels_out: int, channels_in: int, size: int) -> Tensor:
    """Filters float32 [out, in, size, size], a function of the arguments alone: Philox integers, exact
    arithmetic.

    Uniform with He's variance 2 / fan_in. Each filter has zero mean, so that what passes is contrast, not
    brightness: in deep random networks the mean brightness otherwise drowns everything else.
    """
    fan_in = channels_in * size * size
    index = torch.arange(channels_out * fan_in)
    zero = torch.zeros_like(index)
    word, *_ = philox4x32((index, zero + layer, zero, zero), _RANDOM_JUDGE_KEY)
    uniform = (word.double() + 0.5) * 2.0**-31 - 1.0
    filters = (uniform * math.sqrt(6.0 / fan_in)).view(channels_out, fan_in)
    return (filters - filters.mean(dim=1, keepdim=True)).view(channels_out, channels_in, size, size).float()


class RandomJudge(Judge):
    """Three random strided convolutions with ReLU; the mean of each layer's channels over the image, 160
    features.

    Random networks rank generators much as trained ones do and carry no labels (Naeem et al. 2020, section
    5).
    """

    metric = "fid_random"

    def __init__(self, channels: int) -> None:
        super().__init__()
        widths = (32, 64, 64)
        self.feature_dim = sum(widths)
        channels_in = channels
        for layer, (width, size) in enumerate(zip(widths, (5, 3, 3), strict=True)):
            self.register_buffer(f"filters{layer}", _fixed_filters(layer, width, channels_in, size))
            channels_in = width

    def forward(self, images: Tensor) -> Tensor:
        """Features float32 [B, 160] of images [B, C, H, W] in [-1, 1]."""
        x = bounded(images)
        pooled = []
        for filters in self.buffers():
            x = F.relu(F.conv2d(x, filters, stride=2, padding=filters.shape[-1] // 2))
            pooled.append(x.mean(dim=(2, 3)))
        return torch.cat(pooled, dim=1)


class PixelJudge(Judge):
    """The image, averaged down by a whole factor to at most 512 values (14x14 for a 28x28 digit)."""

    metric = "fid_pixels"

    def __init__(self, channels: int, height: int, width: int) -> None:
        super().__init__()
        factor = 1
        while channels * max(1, height // factor) * max(1, width // factor) > _MOST_PIXEL_VALUES:
            factor += 1
        self.size = (max(1, height // factor), max(1, width // factor))
        self.feature_dim = channels * self.size[0] * self.size[1]

    def forward(self, images: Tensor) -> Tensor:
        """Features float32 [B, feature_dim] of images [B, C, H, W] in [-1, 1]."""
        return F.adaptive_avg_pool2d(images.float(), self.size).flatten(1)
