"""Both players' optimizers, their learning rates, and DeepSpeed's configuration dictionary."""

from typing import Any

import torch
from torch import nn

from sadm_fast.config import Config
from sadm_fast.config_training import OptimizerConfig
from sadm_fast.errors import UserError


def is_fused(config: Config) -> bool:
    """Whether both players step by `fused_step.FusedStep`, which clips and skips itself, and not as DeepSpeed steps.

    The reference implementation takes DeepSpeed's steps, but in fp32 without ZeRO those neither clip nor skip.
    """
    zero = config.deepspeed.zero_optimization
    offloaded = zero.offload_optimizer is not None and zero.offload_optimizer.device != "none"
    deepspeeds = config.implementation == "reference" and (zero.stage > 0 or config.train.precision == "bf16")
    adamw = config.denoiser_optimizer.type == config.discriminator_optimizer.type == "adamw"
    return zero.stage < 3 and adamw and not offloaded and not deepspeeds


def deepspeed_dict(config: Config, optimizer: OptimizerConfig, world_size: int, device_type: str) -> dict[str, Any]:
    """DeepSpeed's configuration of one player, derived from ours."""
    train, zero = config.train, config.deepspeed.zero_optimization
    return {
        "train_batch_size": train.micro_batch * train.grad_accumulation * world_size,
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": train.grad_accumulation,
        "gradient_clipping": 0.0 if is_fused(config) else optimizer.gradient_clipping,
        "bf16": {"enabled": train.precision == "bf16"},
        "zero_optimization": zero.model_dump(exclude_none=True) | zero.buckets(device_type),
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 62,
    }


def check_optimizers(config: Config) -> None:
    """Raise UserError if a configured optimizer is not installed here."""
    for player in ("denoiser_optimizer", "discriminator_optimizer"):
        if getattr(config, player).type == "apex_fused_adam":
            _fused_adam(f"{player}.type=apex_fused_adam")


def _fused_adam(asked: str) -> Any:
    try:
        from apex.optimizers import FusedAdam
    except ImportError:
        raise UserError(
            f"{asked}: NVIDIA's apex is not installed (build it from NVIDIA's repository; the PyPI package of that name"
            " is something else); use adamw"
        ) from None
    if not torch.cuda.is_available():
        raise UserError(f"{asked}: needs a CUDA GPU; use adamw")
    return FusedAdam


def build_optimizer(config: OptimizerConfig, module: nn.Module) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters, by torch or by apex."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    arguments: dict[str, Any] = {
        "lr": config.lr,
        "betas": config.betas,
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    if config.type == "apex_fused_adam":
        return _fused_adam("type=apex_fused_adam")(parameters, adam_w_mode=True, **arguments)
    return torch.optim.AdamW(parameters, fused=True, **arguments)  # one pass over the memory, no temporaries


def learning_rate(optimizer: OptimizerConfig, step: int, steps: int) -> float:
    """Learning rate at 0-based `step` of `steps`: up over `warmup_steps`, constant, down over `decay_steps`."""
    warm = (step + 1) / max(1, optimizer.warmup_steps)
    cool = (steps - step) / max(1, optimizer.decay_steps)
    return optimizer.lr * min(1.0, warm, cool)
