"""The text of train.py --dry-run. plan.py says more, for many ranks; this is the run as configured."""

import json

from torch import nn

from sadm_fast.config import Config
from sadm_fast.planning.cost import activations, meta_models, step_flops
from sadm_fast.planning.drawing import drawing
from sadm_fast.planning.memory import rank_memory
from sadm_fast.planning.players import players


def describe(config: Config, num_classes: int, world_size: int, judging: tuple[int, int] | None = None) -> str:
    """Print the resolved configuration, the parameters, FLOPs and MACs of a step, and the memory of one rank.

    judging: as planning.drawing.drawing.
    """
    denoiser, psi = meta_models(config, num_classes)
    lines = [json.dumps(config.resolved(), indent=2), ""]

    def count(module: nn.Module) -> str:
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        return f"{sum(p.numel() for p in module.parameters()):>15,} parameters, {trained:,} trained"

    lines.append(f"denoiser       {count(denoiser)}; {num_classes} classes")
    if psi is not None:
        lines.append(f"discriminator  {count(psi)}")
    batch = config.train.micro_batch * config.train.grad_accumulation
    flops = step_flops(config, denoiser, psi)
    total = sum(flops.values())
    lines += ["", f"One step of one rank, {batch} samples ({batch * world_size} over {world_size} rank(s)):"]
    lines += [f"  {what:<46} {n / 1e9:>12,.2f} GFLOP {n / 2e9:>12,.2f} GMAC" for what, n in flops.items()]
    lines.append(f"  {'all':<46} {total / 1e9:>12,.2f} GFLOP {total / 2e9:>12,.2f} GMAC")
    forward = flops["denoiser forward"] / batch
    lines.append(f"  {'denoiser forward, one sample':<46} {forward / 1e9:>12,.3f} GFLOP {forward / 2e9:>12,.3f} GMAC")
    looking = drawing(config, num_classes, denoiser, judging)
    memory = rank_memory(
        config,
        players(config, denoiser, psi),
        activations(config, denoiser, psi),
        world_size,
        feature_dim=0 if psi is None else psi.feature_dim,
        drawing=looking,
    )
    plan = memory.device | memory.moments[memory.fullest]
    stage = config.deepspeed.zero_optimization.stage
    lines += [
        "",
        f"Memory of one rank, planned (ZeRO stage {stage}, {config.train.precision}; library buffers not counted);",
        f"the fullest moment is the {memory.fullest}:",
    ]
    lines += [f"  {what:<46} {size / 2**20:>12,.1f} MiB" for what, size in plan.items() if size]
    lines.append(f"  {'all':<46} {memory.peak / 2**20:>12,.1f} MiB")
    if memory.host:
        lines.append(f"  {'offloaded to the host':<46} {sum(memory.host.values()) / 2**20:>12,.1f} MiB")
    for moment in looking.moments:
        size = memory.resident + sum(memory.moments[moment].values())
        lines.append(f"  {f'{moment}, between iterations':<46} {size / 2**20:>12,.1f} MiB")
    if looking.left_out is not None:
        lines.append(f"Not counted: {looking.left_out}")
    if psi is not None and config.structure_encoder.input == "pixels":
        lines.append(
            "Not counted: the decoder through which Psi sees pixels, its FLOPs and its memory (docs/training.md)"
        )
    return "\n".join(lines)
