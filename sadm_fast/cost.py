"""What a run will cost, counted without running it: parameters, FLOPs and MACs of a step, memory of a rank.

Models live on the meta device, so nothing is allocated. FLOPs are counted by PyTorch's FlopCounterMode (matrix
products and convolutions; a multiply-add is two FLOPs, one MAC). Papers on diffusion transformers that say "Gflops"
mean MACs.
"""

import json
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sadm_fast.config import Config
from sadm_fast.game import frozen
from sadm_fast.models import DiT
from sadm_fast.preparation import build_denoiser, build_psi
from sadm_kernels import structure_loss

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _flops(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def meta_models(config: Config, num_classes: int) -> tuple[DiT, nn.Module | None]:
    """Both players without memory behind them."""
    with torch.device("meta"):
        dtype = _DTYPES[config.train.precision]
        psi = None if config.game.mode == "plain" else build_psi(config).to(dtype)
        return build_denoiser(config, num_classes).to(dtype), psi


def _denoise(config: Config, denoiser: DiT) -> Tensor:
    b, (c, h, w) = config.train.micro_batch, config.sample_shape
    x = torch.empty(b, c, h, w, device="meta")
    y = torch.zeros(b, dtype=torch.long, device="meta")
    return denoiser(x, torch.empty(b, device="meta"), y)[:, :c]


def step_flops(config: Config, denoiser: DiT, psi: nn.Module | None) -> dict[str, int]:
    """FLOPs of one rank's step, by what they are spent on."""
    accumulation = config.train.grad_accumulation
    xhat0 = _denoise(config, denoiser)
    parts = {
        "denoiser forward": _flops(lambda: _denoise(config, denoiser)),
        "denoiser backward": _flops(lambda: xhat0.sum().backward()),
    }
    if psi is not None:
        leaf = torch.empty_like(xhat0).requires_grad_(True)

        def structure() -> None:
            with frozen(psi):
                with torch.no_grad():
                    f = psi(leaf.detach())
                structure_loss(f, psi(leaf)).backward()

        parts["structure term"] = _flops(structure)
        if config.game.mode == "sadm":

            def discriminate() -> None:
                f, g = psi(torch.cat([leaf.detach(), leaf.detach()])).chunk(2)
                structure_loss(f, g).backward()

            parts["discriminator"] = config.game.discriminator_steps * _flops(discriminate)
            if config.implementation == "reference" or accumulation > 1:
                parts["denoiser forward, again for the discriminator"] = (
                    config.game.discriminator_steps * parts["denoiser forward"]
                )
    return {what: flops * accumulation for what, flops in parts.items()}


def activation_bytes(config: Config, denoiser: DiT) -> int:
    """Bytes autograd keeps of the denoiser's forward on one micro-batch; each storage once, parameters not."""
    own = {p.untyped_storage()._cdata for p in denoiser.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in own:
            kept[key] = tensor  # held, so that no other storage takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = _denoise(config, denoiser)
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del out
    return total


def memory_plan(config: Config, denoiser: DiT, psi: nn.Module | None, world_size: int) -> dict[str, int]:
    """Bytes of one rank by purpose: what ZeRO spreads is divided by the ranks that share it."""
    stage = config.deepspeed.zero_optimization.stage
    width = _DTYPES[config.train.precision].itemsize

    def share(first_stage: int) -> int:
        return world_size if stage >= first_stage else 1

    def player(module: nn.Module) -> dict[str, int]:
        everything = sum(p.numel() for p in module.parameters())
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        # In fp32 without ZeRO the weights are their own masters; ZeRO keeps a second, divided copy.
        masters = 0 if width == 4 and stage == 0 else 4 * trained // share(1)
        return {
            "weights": width * everything // share(3),
            "gradients": width * trained // share(2),
            "fp32 masters": masters,
            "AdamW moments": 8 * trained // share(1),
        }

    plan = {f"denoiser {what}": size for what, size in player(denoiser).items()}
    trained = sum(p.numel() for p in denoiser.parameters() if p.requires_grad)
    plan["EMA"] = 4 * trained // share(1)
    plan["denoiser copy for pictures"] = 4 * sum(p.numel() for p in denoiser.parameters())
    plan["denoiser activations"] = activation_bytes(config, denoiser)
    if psi is not None:
        if config.game.mode == "sadm":
            plan |= {f"Psi {what}": size for what, size in player(psi).items()}
        else:
            plan["Psi weights"] = width * sum(p.numel() for p in psi.parameters())
    return plan


def describe(config: Config, num_classes: int, world_size: int) -> str:
    """The text of --dry-run: resolved configuration, parameters, FLOPs and MACs, memory plan."""
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
    plan = memory_plan(config, denoiser, psi, world_size)
    stage = config.deepspeed.zero_optimization.stage
    lines += [
        "",
        f"Memory of one rank, planned (ZeRO stage {stage}, {config.train.precision}; library buffers not counted):",
    ]
    lines += [f"  {what:<46} {size / 2**20:>12,.1f} MiB" for what, size in plan.items()]
    lines.append(f"  {'all':<46} {sum(plan.values()) / 2**20:>12,.1f} MiB")
    return "\n".join(lines)
