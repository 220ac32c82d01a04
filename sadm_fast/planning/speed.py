"""What a running training achieves: FLOP/s of a rank, and the share of its GPU's peak (MFU)."""

from typing import NamedTuple, Self

import torch

from sadm_fast.build import NONE, Own
from sadm_fast.config import Config
from sadm_fast.planning.cost import meta_models, step_flops
from sadm_fast.planning.gpus import of_device


class StepSpeed(NamedTuple):
    """FLOPs of one rank's step, counted as the planner does (a MAC is two), and the peak of the rank's device."""

    plain: int  # the denoiser's forward and backward
    game: int  # with all that the game adds
    peak: float | None  # FLOP/s, dense, of the run's dtype; None where the device is not in gpus.py

    @classmethod
    def of(cls, config: Config, num_classes: int, device: torch.device, own: Own = NONE) -> Self:
        """Count; takes seconds for a large network."""
        parts = step_flops(config, *meta_models(config, num_classes, own))
        gpu = of_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        peak = None if gpu is None else gpu.bf16 if config.train.precision == "bf16" else gpu.fp32
        return cls(parts["denoiser forward"] + parts["denoiser backward"], sum(parts.values()), peak)

    def achieved(self, steps_per_s: float, playing: bool) -> dict[str, float | None]:
        """`flops_per_s` and `mfu` at so many steps a second, of the game or before it."""
        rate = steps_per_s * (self.game if playing else self.plain)
        return {"flops_per_s": rate, "mfu": None if self.peak is None else rate / self.peak}
