"""DiT: diffusion transformer (Peebles & Xie, "Scalable Diffusion Models with Transformers", 2022).

Module names follow the official release, so that its state_dicts load with strict=True. Written from the paper and from
facts about shapes and initialisation.

Shapes in comments: B samples, C channels, T tokens (patches), D hidden size, p patch size.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sadm_fast.models.denoiser import Denoiser
from sadm_kernels.adaln import gate_residual_norm_modulate, layer_norm_modulate

# (depth, hidden size, heads) of the published sizes
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
PATCHES = (2, 4, 8)
LABEL_TABLE = "y_embedder.embedding_table.weight"
_FREQUENCIES = 256
_MAX_PERIOD = 10000.0


def sincos_1d(positions: Tensor, dim: int) -> Tensor:
    """Return [sin | cos] of positions [N] at dim/2 frequencies, float64 [N, dim]."""
    omega = _MAX_PERIOD ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    angles = positions.double()[:, None] * omega
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_2d(dim: int, grid: int, stretched_from: int | None = None) -> Tensor:
    """Return the position embedding of a grid x grid image, row-major, float32 [grid^2, dim]; column before row.

    stretched_from: positions are those of an image of so many tokens a side, at the tokens' centres; None: of this one.
    """
    positions = (torch.arange(grid, dtype=torch.float64) + 0.5) * ((stretched_from or grid) / grid) - 0.5
    rows, columns = torch.meshgrid(positions, positions, indexing="ij")
    halves = [sincos_1d(axis.flatten(), dim // 2) for axis in (columns, rows)]
    return torch.cat(halves, dim=1).float()


def position_grid(shape: tuple[int, ...]) -> int | None:
    """The side of the square of tokens that a `pos_embed` of this shape, [1, grid^2, dim], is for; None if of none."""
    grid = math.isqrt(shape[1]) if len(shape) == 3 else 0
    return grid if grid and grid**2 == shape[1] else None


def timestep_frequencies(t: Tensor) -> Tensor:
    """Return [cos | sin] of t [B] at 128 frequencies, float32 [B, 256]."""
    half = _FREQUENCIES // 2
    omega = torch.exp(-math.log(_MAX_PERIOD) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * omega
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class PatchEmbed(nn.Module):
    def __init__(self, channels: int, hidden_size: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        # Contiguous: every sum along the residual stream would keep the layout that a convolution leaves, D before T.
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()  # [B, C, H, W] -> [B, T, D]


class TimestepEmbedder(nn.Module):
    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(_FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        first: Any = self.mlp[0]
        return self.mlp(timestep_frequencies(t).to(first.weight.dtype))


class LabelEmbedder(nn.Module):
    """One embedding for each class, and a last one for "no class". The caller drops labels, by counters."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class Scaled(nn.Module):
    """A part of a block whose first layer's output DiffFit scales, one factor a channel; else `gamma` is None."""

    gamma: nn.Parameter | None

    def __init__(self, channels: int, difffit: bool) -> None:
        super().__init__()
        self.register_parameter("gamma", nn.Parameter(torch.ones(channels)) if difffit else None)

    def scaled(self, x: Tensor) -> Tensor:
        return x if self.gamma is None else x * self.gamma


class Attention(Scaled):
    def __init__(self, hidden_size: int, num_heads: int, difffit: bool = False) -> None:
        super().__init__(3 * hidden_size, difffit)
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        qkv = self.scaled(self.qkv(x))  # [B, T, 3 D]
        qkv = qkv.view(b, t, 3, self.num_heads, d // self.num_heads)  # [B, T, 3, heads, D / heads]
        # Views, and one pass in the backward: three gradients into one.
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # [B, heads, T, D / heads] each
        x = F.scaled_dot_product_attention(q, k, v)  # [B, heads, T, D / heads]
        return self.proj(x.transpose(1, 2).reshape(b, t, d))  # [B, T, D]


class Mlp(Scaled):
    def __init__(self, hidden_size: int, ratio: float, difffit: bool = False) -> None:
        super().__init__(int(hidden_size * ratio), difffit)
        self.fc1 = nn.Linear(hidden_size, int(hidden_size * ratio))
        self.fc2 = nn.Linear(int(hidden_size * ratio), hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        h = self.scaled(self.fc1(x))  # [B, T, ratio D]
        return self.fc2(F.gelu(h, approximate="tanh"))  # [B, T, D]


class Block(nn.Module):
    """Transformer block on tokens [B, T, D] with adaLN-Zero conditioning by c [B, D]."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, difffit: bool = False) -> None:
        super().__init__()
        self.attn = Attention(hidden_size, num_heads, difffit)
        self.mlp = Mlp(hidden_size, mlp_ratio, difffit)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)  # [B, D] each
        h = self.attn(layer_norm_modulate(x, shift_a, scale_a))  # [B, T, D]
        # The MLP's gate and residual could share a kernel with the next block's norm, which would save one reading of
        # x a block (2 of 18 bytes an element forward, in bf16); a block is what is compiled, recomputed and gathered.
        x, y = gate_residual_norm_modulate(x, h, gate_a, shift_m, scale_m)  # [B, T, D] each
        return x + gate_m[:, None] * self.mlp(y)


class FinalLayer(nn.Module):
    def __init__(self, hidden_size: int, patch_size: int, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)  # [B, D] each
        return self.linear(layer_norm_modulate(x, shift, scale))  # [B, T, p * p * C_out]


class DiT(Denoiser):
    """Class-conditional transformer on square images or latents. It returns exactly 0 at initialisation.

    Args:
        input_size: height and width; a multiple of `patch_size`.
        in_channels: C of the images.
        out_channels: C of the output; None: 2 x in_channels, for a learned variance, as in the release.
        num_classes: labels are 0 .. num_classes-1; `null_class` is the label for "no class".
        position_grid: positions are stretched from an image of so many tokens a side, for weights of another
            resolution; None: they are this image's.
        difffit: train what DiffFit trains (`difffit_trains`), with its scale factors; the rest is frozen.
        activation_checkpointing: keep only each block's inputs for the backward pass, which recomputes the rest.

    Raises:
        ValueError: a size is not a multiple of what divides it.
    """

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        out_channels: int | None = None,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        position_grid: int | None = None,
        difffit: bool = False,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if input_size % patch_size:
            raise ValueError(f"input_size={input_size}: must be a multiple of patch_size={patch_size}")
        if hidden_size % num_heads or hidden_size % 4:
            raise ValueError(f"hidden_size={hidden_size}: must be a multiple of num_heads={num_heads} and of 4")
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.out_channels = 2 * in_channels if out_channels is None else out_channels
        self.num_classes = num_classes
        self.activation_checkpointing = activation_checkpointing
        self.x_embedder = PatchEmbed(in_channels, hidden_size, patch_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        grid = input_size // patch_size
        self.pos_embed = nn.Parameter(sincos_2d(hidden_size, grid, position_grid)[None], requires_grad=False)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio, difffit) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self._initialize()
        if difffit:
            for name, parameter in self.named_parameters():
                parameter.requires_grad_(difffit_trains(name))

    @classmethod
    def from_name(
        cls,
        name: str,
        *,
        input_size: int = 32,
        num_classes: int = 1000,
        in_channels: int = 4,
        out_channels: int | None = None,
        position_grid: int | None = None,
        difffit: bool = False,
        activation_checkpointing: bool = False,
    ) -> "DiT":
        """Build a published size: "DiT-{S,B,L,XL}/{2,4,8}"; ValueError for any other name."""
        depth, hidden_size, num_heads, patch_size = parse_name(name)
        return cls(
            input_size=input_size,
            patch_size=patch_size,
            in_channels=in_channels,
            out_channels=out_channels,
            hidden_size=hidden_size,
            depth=depth,
            num_heads=num_heads,
            num_classes=num_classes,
            position_grid=position_grid,
            difffit=difffit,
            activation_checkpointing=activation_checkpointing,
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """Load, also from a state without the fixed `pos_embed`.

        Raises:
            ValueError: its `pos_embed` belongs to another number of tokens.
        """
        there = state_dict.setdefault(f"{prefix}pos_embed", self.pos_embed.detach())
        grid, own = position_grid(tuple(there.shape)), self.input_size // self.patch_size
        if grid not in (None, own):
            raise ValueError(
                f"{prefix}pos_embed: is for {grid} x {grid} tokens, this network has {own} x {own}; use"
                f" input_size={grid * self.patch_size}, or delete pos_embed there: this network's own is taken then"
            )
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.x_embedder.proj.out_channels, -1))
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for name in ("0.weight", "2.weight"):
            nn.init.normal_(self.t_embedder.mlp.get_parameter(name), std=0.02)
        # adaLN-Zero: each block starts as the identity, and the network returns 0.
        for name, parameter in self.named_parameters():
            if name.endswith(".bias") or "adaLN_modulation" in name or name == "final_layer.linear.weight":
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Map images x [B, C, H, W], time t [B] and labels y int64 [B] to [B, out_channels, H, W]."""
        x = self.x_embedder(x.to(self.pos_embed.dtype)) + self.pos_embed  # [B, T, D]
        c = self.t_embedder(t) + self.y_embedder(y)  # [B, D]
        for block in self.blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, c, use_reentrant=False, preserve_rng_state=False)  # a block draws no numbers
            else:
                x = block(x, c)  # [B, T, D]
        return self.unpatchify(self.final_layer(x, c))  # [B, T, p * p * C_out] -> [B, C_out, H, W]

    def unpatchify(self, x: Tensor) -> Tensor:
        """Turn tokens [B, T, p * p * C_out] into [B, C_out, H, W]; within a token the channel varies fastest."""
        p, grid = self.patch_size, self.input_size // self.patch_size
        x = x.view(-1, grid, grid, p, p, self.out_channels).permute(0, 5, 1, 3, 2, 4)  # [B, C_out, H/p, p, W/p, p]
        return x.reshape(-1, self.out_channels, self.input_size, self.input_size)


def difffit_trains(name: str) -> bool:
    """Whether DiffFit trains the parameter of this name: biases, the label table, scale factors.

    Xie et al. 2023, "DiffFit" (norms too, but a DiT's have no weights). There is one factor, 1 at first, for each
    channel of what attention and the MLP compute first: queries, keys, values and the hidden layer. Where the paper's
    own are we could not look up; these give its count. Of DiT-XL/2 (width D = 1152) it says 0.83 M, 0.12%. With the
    labels of Food-101 here are 15 D of biases and 7 D of factors in each of 28 blocks, 102 D of labels, and 5 D + 32
    of biases around the blocks: 832,928.
    """
    return name.endswith((".bias", ".gamma")) or name == LABEL_TABLE


def without_gammas(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a plain DiT with the same output, to rounding: scale factors are multiplied into their layers."""
    plain = {name: value for name, value in state.items() if not name.endswith(".gamma")}
    for name in state.keys() - plain.keys():
        part, gamma = name.removesuffix(".gamma"), state[name]
        layer = f"{part}.qkv" if part.endswith(".attn") else f"{part}.fc1"
        plain[f"{layer}.weight"] = plain[f"{layer}.weight"] * gamma[:, None]
        plain[f"{layer}.bias"] = plain[f"{layer}.bias"] * gamma
    return plain


def parse_name(name: str) -> tuple[int, int, int, int]:
    """Return (depth, hidden size, heads, patch size) of a published name like "DiT-XL/2"; ValueError for others."""
    size, _, patch = name.removeprefix("DiT-").partition("/")
    if not name.startswith("DiT-") or size not in SIZES or patch not in map(str, PATCHES):
        allowed = ", ".join(f"DiT-{s}/{p}" for s in SIZES for p in PATCHES)
        raise ValueError(f"{name!r}: must be one of {allowed}")
    return (*SIZES[size], int(patch))
