"""The runs that test_plan_counts.py compares with their plans: small, at every ZeRO stage."""

from dataclasses import dataclass, field
from typing import Any

from sadm_fast.config import Config, check_config

CLASSES = 10
WORLD_SIZE = 2
ITERATIONS = 3  # ZeRO-3 records its trace in the first two


@dataclass(frozen=True)
class PlanCase:
    """One configuration; `zero`, `game` and `train` are changes to the small one."""

    name: str
    stage: int
    zero: dict[str, Any] = field(default_factory=dict)
    game: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    implementation: str = "fast"

    @property
    def config(self) -> Config:
        # The bucket is small, so that it does not hide the rest; the threshold leaves some parameters persistent.
        zero = {"reduce_bucket_size": 20_000, "stage3_param_persistence_threshold": 1_000, **self.zero}
        return check_config(
            {
                "name": self.name,
                "implementation": self.implementation,
                "data": {"resolution": 16, "channels": 1},
                "denoiser": {
                    "patch_size": 4,
                    "hidden_size": 64,
                    "depth": 3,
                    "num_heads": 4,
                    "num_classes": CLASSES,
                },
                "structure_encoder": {"width": 16, "feature_dim": 32},
                "game": self.game,
                "train": {"micro_batch": 2, "steps": 100, "precision": "bf16", **self.train},
                "deepspeed": {"zero_optimization": {"stage": self.stage, **zero}},
            }
        )


_HALF = {"stage3_max_reuse_distance": 250_000, "stage3_prefetch_bucket_size": 0}  # of the denoiser's 257,616 elements
_NONE = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
_FEW = {"stage3_max_reuse_distance": 150_000, "stage3_max_live_parameters": 90_000}
_TWICE = {"grad_accumulation": 2}
_AVERAGES = {"more_ema": [{"profile": "power", "std": 0.05}, {"profile": "constant"}]}

# In `make test`; the others are in `make test-faults`.
QUICK = (
    *(f"zero{stage}" for stage in range(4)), "zero2-accumulation", "zero3-no-reuse", "zero3-prefetch", "zero2-overlap",
    "zero3-offload", "zero2-checkpointing", "global", "queue",
)  # fmt: skip

CASES = {
    case.name: case
    for case in [
        *(PlanCase(f"zero{stage}", stage, train=_AVERAGES if stage else {}) for stage in range(4)),
        *(PlanCase(f"zero{stage}-fp32", stage, train={"precision": "fp32"}) for stage in (0, 2)),
        *(PlanCase(f"zero{stage}-accumulation", stage, train=_TWICE) for stage in (1, 2)),
        PlanCase("zero3-short-reuse", 3, zero=_HALF),
        PlanCase("zero3-few-live", 3, zero=_FEW, game={"mode": "plain"}),
        PlanCase("zero3-no-reuse", 3, zero=_NONE, game={"discriminator_steps": 2}),
        PlanCase("zero3-prefetch", 3, zero={**_NONE, "stage3_prefetch_bucket_size": 4_000}),
        PlanCase("zero3-prefetch-recomputed", 3, zero={"stage3_prefetch_bucket_size": 30_000}, train=_TWICE),
        PlanCase("zero3-all-persistent", 3, zero={"stage3_param_persistence_threshold": 100_000}),
        PlanCase("zero2-overlap", 2, zero={"overlap_comm": True}, game={"mode": "structure"}),
        PlanCase("zero2-offload", 2, zero={"offload_optimizer": {"device": "cpu"}}),
        PlanCase("zero2-offload-accumulation", 2, zero={"offload_optimizer": {"device": "cpu"}}, train=_TWICE),
        PlanCase("zero3-offload", 3, zero={"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}),
        PlanCase("zero2-checkpointing", 2, train={"activation_checkpointing": True}),
        PlanCase("zero3-checkpointing", 3, zero=_NONE, train={"activation_checkpointing": True}),
        PlanCase("global", 1, game={"scope": "global", "same_class": True, "gate_log_snr": 0.0}),
        PlanCase("queue", 2, game={"queue": 4096}),  # as large as the networks
        PlanCase("global-reference", 0, game={"scope": "global"}, implementation="reference"),
    ]
}
