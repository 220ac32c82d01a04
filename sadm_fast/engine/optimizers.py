"""Both players' optimizers, their learning rates, and DeepSpeed's configuration dictionary."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sadm_fast.config import Config, OptimizerConfig
from sadm_fast.errors import UserError


def is_guarded(config: Config) -> bool:
    """Whether our optimizer clips and skips, because DeepSpeed does neither in fp32 without ZeRO."""
    return config.train.precision == "fp32" and config.deepspeed.zero_optimization.stage == 0


def deepspeed_dict(config: Config, optimizer: OptimizerConfig, world_size: int, device_type: str) -> dict[str, Any]:
    """DeepSpeed's configuration of one player, derived from ours."""
    train, zero = config.train, config.deepspeed.zero_optimization
    guarded = is_guarded(config) and optimizer.type == "adamw"
    return {
        "train_batch_size": train.micro_batch * train.grad_accumulation * world_size,
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": train.grad_accumulation,
        "gradient_clipping": 0.0 if guarded else optimizer.gradient_clipping,
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


def build_optimizer(config: OptimizerConfig, module: nn.Module, guarded: bool) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters, by torch or by apex; `guarded` as `is_guarded` says."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    arguments: dict[str, Any] = {
        "lr": config.lr,
        "betas": config.betas,
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    if config.type == "apex_fused_adam":
        return _fused_adam("type=apex_fused_adam")(parameters, adam_w_mode=True, **arguments)
    if guarded:
        return GuardedAdamW(parameters, max_norm=config.gradient_clipping, fused=True, **arguments)
    return torch.optim.AdamW(parameters, fused=True, **arguments)  # one pass over the memory, no temporaries


def learning_rate(optimizer: OptimizerConfig, step: int, steps: int) -> float:
    """Learning rate at 0-based `step` of `steps`: up over `warmup_steps`, constant, down over `decay_steps`."""
    warm = (step + 1) / max(1, optimizer.warmup_steps)
    cool = (steps - step) / max(1, optimizer.decay_steps)
    return optimizer.lr * min(1.0, warm, cool)


class GuardedAdamW(torch.optim.AdamW):
    """Measures the gradient's norm, leaves the weights alone when it is not finite, and clips.

    The engine reads `overflow` and `_global_grad_norm` after a step, as it does from DeepSpeed's own wrappers. Its
    gradient_clipping must be 0 beside this, so that the norm is the one before clipping.

    Args:
        max_norm: largest norm of the gradient; 0 means no clipping.
    """

    def __init__(self, parameters: Iterable[Tensor], *, max_norm: float, **arguments: Any) -> None:
        super().__init__(parameters, **arguments)
        self.max_norm = max_norm
        self.overflow = False
        self._global_grad_norm: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; none if a gradient is not finite."""
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        self._global_grad_norm = norm
        self.overflow = not math.isfinite(norm.item())
        if self.overflow:
            return None
        if self.max_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.max_norm, norm)
        return super().step(closure)
