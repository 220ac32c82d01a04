"""Psi, the structure discriminator: an encoder from samples [B, C, H, W] to features [B, feature_dim].

No layer mixes samples, so the relation of a pair is the same on every rank and in every batch. Batch statistics would
make a feature depend on the rest of the rank's batch. So ResNet-18 has group norm, or batch norm that always uses its
stored statistics ("frozen").
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor, nn

from sadm_fast.models.pixels import ImageNetPixels

_GROUPS = 8
_CELLS = 2  # SmallCNN pools its last map to so many cells a side
_OF_A_STAGE = 3  # modules of a stage of SmallCNN: convolution, norm, activation

Norm = Callable[[int], nn.Module]


class StructureEncoder(nn.Module):
    """What every Psi is to the rest of the program; one of your own subclasses it (docs/extending.md).

    No layer may mix samples. `feature_dim` is the length of a feature row. With `map_stage` (game.compare=tokens and
    locations) forward returns the feature map of that stage, the first being 1, as tokens [B, T, C], of at most
    `map_cells` a side.
    """

    feature_dim: int
    map_stage: int | None = None
    map_cells = 8

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Features [B, feature_dim] of samples [B, C, ...]."""


def tokens_of(maps: Tensor, cells: int) -> Tensor:
    """Feature maps [B, C, h, w] as tokens [B, T, C]; larger than cells x cells they are averaged down to that."""
    height, width = (min(side, cells) for side in maps.shape[-2:])
    if (height, width) != tuple(maps.shape[-2:]):
        maps = F.adaptive_avg_pool2d(maps, (height, width))
    return maps.flatten(2).transpose(1, 2)


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """Batch norm by stored statistics, in train mode too. `collect_statistics` is where they are learned.

    Keys and shapes are those of nn.BatchNorm2d, so that torchvision's weights load.
    """

    collecting = False

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = self.running_mean, self.running_var
        if not self.collecting and mean is not None and variance is not None:
            mean, variance = mean.to(x.dtype), variance.to(x.dtype)  # an engine in bf16 may leave buffers in fp32
        return F.batch_norm(
            x,
            mean,
            variance,
            self.weight,
            self.bias,
            training=self.collecting,
            momentum=self.momentum or 0.1,
            eps=self.eps,
        )


@contextmanager
def collect_statistics(module: nn.Module) -> Iterator[None]:
    """Make frozen batch norms ordinary ones inside the block, for training as a classifier."""
    layers = [m for m in module.modules() if isinstance(m, FrozenBatchNorm2d)]
    for layer in layers:
        layer.collecting = True
    try:
        yield
    finally:
        for layer in layers:
            layer.collecting = False


class BasicBlock(nn.Module):
    """ResNet's basic block: two 3x3 convolutions and a skip; [B, C_in, H, W] -> [B, C, H/stride, W/stride]."""

    def __init__(self, channels_in: int, channels: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = norm(channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or channels_in != channels:
            self.downsample = nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride, bias=False), norm(channels))

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)) + skip)


class ResNet18(StructureEncoder):
    """ResNet-18 (He et al. 2015) without its classifier: [B, C, H, W] -> [B, 512]; keys of torchvision's resnet18.

    Args:
        in_channels: with 3, input is taken as pixels in [-1, 1] and normalised by ImageNet's mean and deviation.
        stem: "imagenet" (7x7, stride 2, max-pool), or "small" (3x3, stride 1) for latents and images of up to about 64
            pixels.
        norm: "group", or "frozen" batch norm, which torchvision's weights need.
    """

    feature_dim = 512

    def __init__(self, in_channels: int = 3, stem: str = "imagenet", norm: str = "group") -> None:
        super().__init__()
        make: Norm = FrozenBatchNorm2d if norm == "frozen" else lambda c: nn.GroupNorm(_GROUPS, c)
        self.stem = stem
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        else:
            self.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
        self.bn1 = make(64)
        channels_in = 64
        for i, channels in enumerate((64, 128, 256, 512), start=1):
            blocks = [
                BasicBlock(channels_in, channels, 1 if i == 1 else 2, make),
                BasicBlock(channels, channels, 1, make),
            ]
            self.add_module(f"layer{i}", nn.Sequential(*blocks))
            channels_in = channels
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.pixels = ImageNetPixels()

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] == 3:
            x = self.pixels(x)
        x = F.relu(self.bn1(self.conv1(x.to(self.conv1.weight.dtype))))
        if self.stem == "imagenet":
            x = F.max_pool2d(x, 3, stride=2, padding=1)
        for i in range(1, 5):
            x = self.get_submodule(f"layer{i}")(x)
            if self.map_stage == i:
                return tokens_of(x, self.map_cells)
        return x.mean(dim=(2, 3))


class SmallCNN(StructureEncoder):
    """Three strided convolutions with group norm, for small images: [B, C, H, W] -> [B, feature_dim].

    The last map is pooled to 2x2 cells, not to one, so that features keep rough positions. In the screening of
    docs/experiments.md (one seed) that gained more than global pooling.
    """

    def __init__(self, in_channels: int = 1, width: int = 32, feature_dim: int = 64) -> None:
        super().__init__()
        self.feature_dim = feature_dim
        layers: list[nn.Module] = []
        channels_in = in_channels
        for channels in (width, 2 * width, 4 * width):
            layers += [
                nn.Conv2d(channels_in, channels, 3, stride=2, padding=1, bias=False),
                nn.GroupNorm(_GROUPS, channels),
                nn.SiLU(),
            ]
            channels_in = channels
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(channels_in * _CELLS**2, feature_dim)

    def forward(self, x: Tensor) -> Tensor:
        maps = x.to(self.head.weight.dtype)
        for number, layer in enumerate(self.layers, start=1):
            maps = layer(maps)
            if self.map_stage is not None and number == _OF_A_STAGE * self.map_stage:
                return tokens_of(maps, self.map_cells)
        return self.head(F.adaptive_avg_pool2d(maps, _CELLS).flatten(1))
