"""The U-Net of EDM's pixel experiments: DDPM++ (Song et al. 2021, as Karras et al. 2022 train it), of diffusers' parts.

`UNet2DModel` holds the parameters under its own names; what EDM has otherwise is set here: residual sums divided by
the square root of 2, labels and augmentation added to the sinusoids and not behind their MLP, xavier initialisation,
dropout by counters. Three things stay as diffusers has them: the first convolution is as wide as the first level, the
sinusoids as many, and every residual block of an attending level attends, on the way up as well.

Shapes in comments: B samples, C channels, E channels of the first level.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sadm_fast.counters import keep_mask
from sadm_fast.errors import UserError
from sadm_fast.models.denoiser import Denoiser

_SKIP = math.sqrt(2.0)


class CountedDropout(nn.Module):
    """Dropout of x [B, ...] whose mask is a function of (seed, layer, sample); none where `sample_ids` is None."""

    def __init__(self, rate: float, seed: int, layer: int) -> None:
        super().__init__()
        self.rate, self.seed, self.layer = rate, seed, layer
        self.sample_ids: Tensor | None = None  # int64 [B], of the forward that runs

    def forward(self, x: Tensor) -> Tensor:
        if self.sample_ids is None:
            return x
        keep = keep_mask(self.seed, self.layer, self.sample_ids, x.shape[1:], self.rate)
        return x * keep * (1.0 / (1.0 - self.rate))


class UNet(Denoiser):
    """A U-Net on square images or latents, with or without labels.

    Args:
        input_size: height and width, a multiple of 2 for each level but the first.
        in_channels, out_channels: C of the images, and of the output.
        num_classes: labels are 0 .. num_classes - 1, if `conditional`.
        channels: of a level with multiplier 1.
        multipliers: one for each level, each half as wide and high as the one before.
        depth: residual blocks of a level on the way down; one more on the way up.
        attention_resolutions: sides of the levels that attend; one head.
        time_factor: the sinusoids are of time_factor * t; EDM's of ln(sigma) / 4.
        conditional: False: it is told no labels, and has no null class.
        augmentation_labels: numbers by which it is told how its images were augmented; 0: it is not.
        dropout: rate, in the residual blocks.
        seed: of dropout.
        activation_checkpointing: keep only the blocks' inputs for the backward pass, which recomputes the rest.

    Raises:
        UserError: diffusers is not installed.
        ValueError: a size is not a multiple of what divides it, or no level attends that should.
    """

    def __init__(
        self,
        input_size: int,
        in_channels: int,
        out_channels: int,
        num_classes: int,
        *,
        channels: int = 128,
        multipliers: Sequence[int] = (2, 2, 2),
        depth: int = 4,
        attention_resolutions: Sequence[int] = (16,),
        time_factor: float = 1.0,
        conditional: bool = True,
        augmentation_labels: int = 0,
        dropout: float = 0.0,
        seed: int = 0,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        try:
            from diffusers import UNet2DModel  # takes seconds to import
        except ImportError:
            raise UserError(
                "denoiser.architecture=unet: its parts are diffusers', which is not installed: pip install diffusers"
            ) from None
        sides = level_sides(input_size, len(multipliers))
        if not set(attention_resolutions) <= set(sides):
            raise ValueError(f"attention_resolutions={list(attention_resolutions)}: levels have {sides}")
        self.input_size, self.in_channels, self.out_channels = input_size, in_channels, out_channels
        self.num_classes, self.conditional = num_classes, conditional
        self.time_factor, self.activation_checkpointing = time_factor, activation_checkpointing
        attends = [side in attention_resolutions for side in sides]
        widths = [channels * multiplier for multiplier in multipliers]
        self.unet: Any = UNet2DModel(
            sample_size=input_size,
            in_channels=in_channels,
            out_channels=out_channels,
            freq_shift=1,  # frequencies from 1 to 1e-4, both included
            flip_sin_to_cos=False,
            block_out_channels=tuple(widths),
            time_embedding_dim=4 * channels,
            layers_per_block=depth,
            down_block_types=tuple("AttnDownBlock2D" if attend else "ResnetDownsampleBlock2D" for attend in attends),
            up_block_types=tuple("AttnUpBlock2D" if attend else "ResnetUpsampleBlock2D" for attend in attends[::-1]),
            downsample_type="resnet",
            upsample_type="resnet",
            attention_head_dim=None,  # one head
            norm_num_groups=norm_groups(channels),
            norm_eps=1e-6,
        )
        self.label_embedding = nn.Embedding(num_classes + 1, widths[0]) if conditional else None
        self.augment_embedding = nn.Linear(augmentation_labels, widths[0], bias=False) if augmentation_labels else None
        # Not registered a second time: names are diffusers'.
        blocks = nn.ModuleList([*self.unet.down_blocks, self.unet.mid_block, *self.unet.up_blocks])
        object.__setattr__(self, "blocks", blocks)
        self._dropouts: list[CountedDropout] = []
        for part in self.unet.modules():
            if hasattr(part, "output_scale_factor"):  # a residual block
                part.output_scale_factor = _SKIP
                part.dropout = CountedDropout(dropout, seed, len(self._dropouts)) if dropout else nn.Identity()
                self._dropouts += [part.dropout] if dropout else []
            elif hasattr(part, "rescale_output_factor"):  # attention
                part.rescale_output_factor = _SKIP
        self._initialize()

    @property
    def null_class(self) -> int | None:
        return self.num_classes if self.conditional else None

    def _initialize(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
                nn.init.xavier_uniform_(module.weight, _gain(name))
            if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, sample_ids: Tensor | None = None, augmentation: Tensor | None = None
    ) -> Tensor:
        """Map images x [B, C, H, W], time t [B] and labels y int64 [B] to [B, out_channels, H, W].

        sample_ids: int64 [B], what dropout is drawn from; None: no dropout.
        augmentation: how the images were augmented, [B, augmentation_labels]; None: the images are as they were.
        """
        unet, ids = self.unet, sample_ids
        dtype = unet.conv_in.weight.dtype
        embedding = unet.time_proj(self.time_factor * t).to(dtype)  # [B, E]
        if self.label_embedding is not None:
            embedding = embedding + self.label_embedding(y) * math.sqrt(self.num_classes)
        if augmentation is not None and self.augment_embedding is not None:
            embedding = embedding + self.augment_embedding(augmentation.to(dtype))
        embedding = unet.time_embedding(embedding)  # [B, 4 channels]
        x = unet.conv_in(x.to(dtype))  # [B, E, H, W]
        skips = [x]
        for block in unet.down_blocks:
            x, outputs = self._call(block, ids, x, embedding)  # half as wide and high, but for the last
            skips += outputs
        x = self._call(unet.mid_block, ids, x, embedding)
        for block in unet.up_blocks:
            first = len(skips) - len(block.resnets)
            x = self._call(block, ids, x, embedding, *skips[first:])
            del skips[first:]
        return unet.conv_out(F.silu(unet.conv_norm_out(x)))

    def _call(self, block: nn.Module, sample_ids: Tensor | None, *inputs: Tensor) -> Any:
        """block(x, embedding), or on the way up block(x, skips, embedding); inputs: (x, embedding, *skips)."""

        def run(x: Tensor, embedding: Tensor, *skips: Tensor) -> Any:
            for dropout in self._dropouts:  # again when it is recomputed
                dropout.sample_ids = sample_ids
            return block(x, skips, embedding) if skips else block(x, embedding)

        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False)  # dropout is by counters
        return run(*inputs)


def level_sides(side: int, levels: int) -> list[int]:
    """Sides of the levels, each half of the one before; ValueError if the image cannot be halved as often."""
    if side % 2 ** (levels - 1):
        raise ValueError(f"side {side}: {levels} levels need a multiple of {2 ** (levels - 1)}")
    return [side >> level for level in range(levels)]


def norm_groups(channels: int) -> int:
    """Groups of the group norms: of at least 4 channels, at most 32 groups; ValueError if they do not divide them."""
    groups = min(32, channels // 4)
    if channels % 4 or channels % groups:
        raise ValueError(f"channels={channels}: must be a multiple of 4, and of 32 from 128 on")
    return groups


def _gain(name: str) -> float:
    """EDM's: what ends a residual branch, and the network, begins at almost nothing."""
    if name.endswith((".conv2", ".to_out.0")) or name == "unet.conv_out":
        return 1e-5
    return math.sqrt(0.2) if name.endswith((".to_q", ".to_k", ".to_v")) else 1.0
