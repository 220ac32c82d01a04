"""ViT (Dosovitskiy et al. 2021) as an encoder, with what DINOv2 added (Oquab et al. 2023): layer scale, registers.

Names follow DINOv2's release, which are timm's too, so that their state_dicts load. Written from the papers and from
facts about names and shapes.

Shapes in comments: B images, C channels, T patches, R registers, D width.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sadm_fast.models.pixels import ImageNetPixels
from sadm_fast.models.structure_encoder import StructureEncoder, tokens_of

_HEAD_WIDTH = 64  # of every published size
_STRETCH = 0.1  # tokens: DINOv2 resamples its positions to a grid larger by so much, against rounding
_UNUSED = ("mask_token", "head.")  # of a file: for training, and a classifier


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))  # [B, tokens, 3, heads, D / heads]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Transformer block on [B, tokens, D], norms first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.ls1 = LayerScale(width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width)
        self.ls2 = LayerScale(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    def __init__(self, channels: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)  # [B, C, H, W] -> [B, T, D]


class ViT(StructureEncoder):
    """Encoder of images [B, C, H, W] to the normed class token, [B, width].

    Args:
        in_channels: with 3, input is taken as pixels in [-1, 1] and normalised by ImageNet's mean and deviation.
        patch_size: side of a patch.
        width, depth: D, a multiple of 64 or one head alone, and the number of blocks.
        position_grid: side of the table of positions, in patches; other grids resample it (bicubic).
        input_size: images of another side are resized to it (bicubic, antialiased); a multiple of patch_size.
        registers: tokens that take part and are not read (Darcet et al. 2024).

    Raises:
        ValueError: input_size is not a multiple of patch_size.
    """

    def __init__(
        self,
        in_channels: int = 3,
        patch_size: int = 14,
        width: int = 768,
        depth: int = 12,
        position_grid: int = 37,
        input_size: int = 224,
        registers: int = 0,
    ) -> None:
        super().__init__()
        if input_size % patch_size:
            raise ValueError(f"input_size={input_size}: must be a multiple of patch_size={patch_size}")
        self.feature_dim, self.input_size, self.patch_size = width, input_size, patch_size
        self.pixels = ImageNetPixels()
        self.patch_embed = PatchEmbed(in_channels, width, patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + position_grid**2, width))
        if registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, registers, width))
        self.registers = registers
        heads = width // _HEAD_WIDTH if width % _HEAD_WIDTH == 0 else 1
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        for name, parameter in self.named_parameters():
            if name.endswith((".bias", "norm.weight", "gamma")) or ".norm" in name:
                continue
            nn.init.trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], input_size: int = 224) -> "ViT":
        """Build the network that a file's `state` is for, by its shapes, with its weights, in eval mode.

        Raises ValueError if it is not that of a ViT with a class token.
        """
        try:
            width, channels, patch_size, _ = state["patch_embed.proj.weight"].shape
            grid = math.isqrt(state["pos_embed"].shape[1] - 1)
            registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
            depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
            network = cls(channels, patch_size, width, depth, grid, input_size, registers)
            network.load_state_dict(network.own_names(state), strict=True)
        except (KeyError, ValueError, IndexError, RuntimeError) as error:
            raise ValueError(f"is not of a ViT ({' '.join(str(error).split())[:200]})") from None
        return network.eval()

    def own_names(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The part of a file's `state` that this network has; a file without layer scale gets ones."""
        own = {name: value for name, value in state.items() if not name.startswith(_UNUSED)}
        if not any(".ls1." in name for name in own):
            own |= {name: torch.ones_like(value) for name, value in self.state_dict().items() if ".gamma" in name}
        return own

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] == 3:
            x = self.pixels(x)
        if x.shape[2:] != (self.input_size, self.input_size):
            x = F.interpolate(x, (self.input_size, self.input_size), mode="bicubic", antialias=True)
        x = self.patch_embed(x.to(self.cls_token.dtype))  # [B, T, D]
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self._positions()  # [B, 1 + T, D]
        if self.registers:
            x = torch.cat([x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]], dim=1)
        for number, block in enumerate(self.blocks, start=1):
            x = block(x)  # [B, 1 + R + T, D]
            if self.map_stage == number:
                side = self.input_size // self.patch_size
                maps = x[:, 1 + self.registers :].transpose(1, 2).unflatten(2, (side, side))
                return tokens_of(maps, self.map_cells)
        return self.norm(x[:, 0])

    def _positions(self) -> Tensor:
        """The table of positions for this input's grid, [1, 1 + T, D]; resampled as DINOv2's release does."""
        grid, there = self.input_size // self.patch_size, math.isqrt(self.pos_embed.shape[1] - 1)
        if grid == there:
            return self.pos_embed
        table = self.pos_embed[:, 1:].unflatten(1, (there, there)).permute(0, 3, 1, 2)  # [1, D, there, there]
        options: dict[str, Any] = {"mode": "bicubic"}
        if self.registers:  # the release's newer models
            options |= {"size": (grid, grid), "antialias": True}
        else:
            options |= {"scale_factor": (grid + _STRETCH) / there}
        table = F.interpolate(table.float(), **options).to(table.dtype)
        return torch.cat([self.pos_embed[:, :1], table.flatten(2).transpose(1, 2)], dim=1)
