"""DiT as diffusers has it: DiTTransformer2DModel's names, and the folder that DiTPipeline loads.

Three things differ from DiT's release, and from here:

- Every block has its own copy of both embedders.
- Frequencies of the time embedding: 10000^(-i/127) instead of 10000^(-i/128). Nothing in a configuration changes that,
  so the same weights draw other images there. `time_fit` turns one set of sinusoids into the other at the steps of one
  DDIM sampler.
- The pipeline takes label 1000 for "no class". With fewer classes the label table is filled up to there.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sadm_fast.build import Undrawn
from sadm_fast.diffusion import VP
from sadm_fast.models.autoencoder import Autoencoder
from sadm_fast.models.dit import DiT, timestep_frequencies

WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
TIME_STEPS = "_sadm_fast_time_steps"  # in the transformer's config.json: for how many steps of DDIM its time is fitted
TRANSFORMER = "transformer"

_CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")  # the second is what the first was called
PIPELINE_NULL_CLASS = 1000  # DiTPipeline's own, whatever the number of classes
_PROCESS = VP()
_FREQUENCIES = 128
_MAX_PERIOD = 10000.0
_MOST_FITTED = 64  # steps: beyond, sinusoids are too alike for a fit in float32

_OUTSIDE = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_IN_BLOCK = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
_QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
_EMBEDDERS = {
    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "norm1.emb.class_embedder.embedding_table",
}
_TABLE, _FIRST_OF_TIME = "y_embedder.embedding_table.weight", "t_embedder.mlp.0.weight"


def fitted_steps(steps: int) -> list[int]:
    """The levels of a DDIM sampler of so many steps, as DiTPipeline and `sampling.steps=ddimN` take them; falling.

    Raises ValueError if they are not the same there as here, or too many for `time_fit`.
    """
    there = _PROCESS.num_steps
    fitting = [n for n in range(1, _MOST_FITTED + 1) if there % n == 0]
    if steps not in fitting:
        raise ValueError(f"{steps}: must be one of {', '.join(map(str, fitting))}")
    return list(range(0, there, there // steps))[::-1]


def time_fit(levels: Sequence[int]) -> Tensor:
    """The matrix A, float64 [256, 256], that takes diffusers' time embedding to DiT's at the time `levels`.

    It is the identity plus the smallest correction that does: W1 A in place of the embedder's first matrix W1 gives
    the same network at these levels. At others both are equally far from DiT's.
    """
    t = torch.tensor(levels, dtype=torch.float64)
    omega = _MAX_PERIOD ** (-torch.arange(_FREQUENCIES, dtype=torch.float64) / (_FREQUENCIES - 1))
    angles = t[:, None] * omega
    theirs = torch.cat([angles.cos(), angles.sin()], dim=1)
    ours = timestep_frequencies(t).double()
    return torch.eye(2 * _FREQUENCIES, dtype=torch.float64) + (torch.linalg.pinv(theirs) @ (ours - theirs)).T


def is_diffusers(names: Mapping[str, Any]) -> bool:
    """Whether these are names of a DiTTransformer2DModel."""
    return "transformer_blocks.0.norm1.linear.weight" in names


def transformer_folder(folder: Path) -> Path | None:
    """Where in `folder`, a pipeline's or a transformer's, the transformer's files are; None if in neither place."""
    for place in (folder, folder / TRANSFORMER):
        if _configuration(place).get("_class_name") in _CLASSES:
            return place
    return None


def from_diffusers(state: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """DiT's names for a DiTTransformer2DModel's `state`, read from a file in `folder`; the rest keeps its names.

    A label table that was filled up is cut to its classes, and a fitted time embedding is what it was. pos_embed, which
    has no weights there, is absent.

    Raises:
        ValueError: the blocks have embedders of their own, or names are missing.
    """
    rest, found = dict(state), {}

    def take(name: str) -> Tensor:
        if name not in rest:
            raise ValueError(f"it lacks {name}")
        return rest.pop(name)

    depth = 1 + max(int(match[1]) for match in map(re.compile(r"transformer_blocks\.(\d+)\.").match, rest) if match)
    for part in ("weight", "bias"):
        for ours, theirs in _OUTSIDE.items():
            found[f"{ours}.{part}"] = take(f"{theirs}.{part}")
        for ours, theirs in _EMBEDDERS.items():
            if (ours, part) == ("y_embedder.embedding_table", "bias"):
                continue
            copies = [take(f"transformer_blocks.{k}.{theirs}.{part}") for k in range(depth)]
            if not all(torch.equal(copies[0], other) for other in copies[1:]):
                raise ValueError(f"its blocks have a {theirs} each; a DiT has one for all")
            found[f"{ours}.{part}"] = copies[0]
        for k in range(depth):
            for ours, theirs in _IN_BLOCK.items():
                found[f"blocks.{k}.{ours}.{part}"] = take(f"transformer_blocks.{k}.{theirs}.{part}")
            found[f"blocks.{k}.attn.qkv.{part}"] = torch.cat(
                [take(f"transformer_blocks.{k}.{name}.{part}") for name in _QKV]
            )
    if "pos_embed.pos_embed" in rest:  # of early versions
        found["pos_embed"] = rest.pop("pos_embed.pos_embed")
    table = found[_TABLE]
    filled = int((table != table[-1]).any(dim=1).sum())  # rows up to the first copy of the last
    found[_TABLE] = table[: filled + 1]
    if (steps := _configuration(folder).get(TIME_STEPS)) is not None:
        first = found[_FIRST_OF_TIME]
        found[_FIRST_OF_TIME] = torch.linalg.solve(time_fit(fitted_steps(steps)), first.double(), left=False).to(first)
    return found | rest


def to_diffusers(state: Mapping[str, Tensor], steps: int) -> dict[str, Tensor]:
    """A DiTTransformer2DModel's names for DiT's `state`; the inverse of `from_diffusers`.

    steps: of the DDIM sampler at whose levels both are the same network; 0: none, the weights stay as they are.
    """
    state, found = dict(state), {}
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    state[_TABLE] = torch.cat(
        [state[_TABLE], state[_TABLE][-1:].expand(PIPELINE_NULL_CLASS + 1 - len(state[_TABLE]), -1)]
    )
    if steps:
        first = state[_FIRST_OF_TIME]
        state[_FIRST_OF_TIME] = (first.double() @ time_fit(fitted_steps(steps))).to(first)
    for part in ("weight", "bias"):
        for ours, theirs in _OUTSIDE.items():
            found[f"{theirs}.{part}"] = state[f"{ours}.{part}"]
        for k in range(depth):
            block = f"transformer_blocks.{k}"
            for ours, theirs in _EMBEDDERS.items():
                if f"{ours}.{part}" in state:
                    found[f"{block}.{theirs}.{part}"] = state[f"{ours}.{part}"]
            for ours, theirs in _IN_BLOCK.items():
                found[f"{block}.{theirs}.{part}"] = state[f"blocks.{k}.{ours}.{part}"]
            for name, value in zip(_QKV, state[f"blocks.{k}.attn.qkv.{part}"].chunk(3), strict=True):
                found[f"{block}.{name}.{part}"] = value
    return found


def save_pipeline(folder: Path, denoiser: DiT, autoencoder: Autoencoder, classes: Sequence[str], steps: int) -> None:
    """Write the folder that DiTPipeline.from_pretrained loads: transformer, DDIM scheduler, VAE, names of classes.

    Args:
        denoiser: of VP; on the CPU. At most 1000 classes.
        autoencoder: of its latents; without a shift, which the pipeline does not know.
        steps: as of `to_diffusers`.
    """
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel  # takes seconds to import

    weights = to_diffusers(denoiser.state_dict(), steps)
    hidden_size = denoiser.pos_embed.shape[2]
    first: Any = denoiser.blocks[0]
    heads = first.attn.num_heads
    with Undrawn():
        transformer = DiTTransformer2DModel(
            num_attention_heads=heads,
            attention_head_dim=hidden_size // heads,
            in_channels=denoiser.in_channels,
            out_channels=denoiser.out_channels,
            num_layers=len(denoiser.blocks),
            sample_size=denoiser.input_size,
            patch_size=denoiser.patch_size,
            num_embeds_ada_norm=PIPELINE_NULL_CLASS,
            norm_eps=1e-6,  # the release's; the default is another
        )
    transformer.load_state_dict(weights, strict=True)
    scheduler = DDIMScheduler(
        num_train_timesteps=_PROCESS.num_steps,
        beta_start=_PROCESS.beta_start,
        beta_end=_PROCESS.beta_end,
        clip_sample=False,
        set_alpha_to_one=True,
    )
    vae = autoencoder.module
    vae.register_to_config(scaling_factor=autoencoder.scale.scale)
    pipeline = DiTPipeline(transformer=transformer, vae=vae, scheduler=scheduler)
    pipeline.register_to_config(id2label={str(label): name for label, name in enumerate(classes)})
    pipeline.save_pretrained(folder)
    if steps:
        file = folder / TRANSFORMER / "config.json"
        file.write_text(json.dumps(_configuration(file.parent) | {TIME_STEPS: steps}, indent=2) + "\n")


def _configuration(folder: Path) -> dict[str, Any]:
    """The config.json in a folder of diffusers; empty if there is none."""
    try:
        value = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
