"""The cases of test_players.py: tiny configurations, starting weights and batches, the same in every process."""

from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from sadm_fast.config import Config, check_config
from sadm_fast.feed import draw_batch
from sadm_fast.game import Batch

MODES = ("plain", "structure", "sadm")
STAGES = (0, 1, 2, 3)
ITERATIONS = 3
MICRO_BATCH = 4
CLASSES = 3
CLIP = 0.05
UNET = {
    "architecture": "unet",
    "channels": 8,
    "channel_multipliers": [1, 2],
    "attention_resolutions": [4],
    "dropout": 0.2,
    "augment": 0.5,
}


@dataclass(frozen=True)
class Case:
    """One way to set up the players; `game` and `zero` are changes to the tiny configuration."""

    name: str
    mode: str
    stage: int
    accumulation: int = 1
    precision: str = "fp32"
    implementation: str = "fast"
    clipping: float = 0.0
    compiled: bool | str = False  # train.compile
    game: dict[str, Any] = field(default_factory=dict)
    zero: dict[str, Any] = field(default_factory=dict)
    checkpointing: bool = False  # of activations
    depth: int = 1
    shown: bool = False  # Psi looks at samples as `see` shows them
    unet: bool = False  # with dropout and augmentation
    difffit: bool = False

    @property
    def config(self) -> Config:
        # AdamW divides a gradient by its own size, so it makes a whole step of one that is rounding noise, unless eps
        # is beyond that noise: 1e-2 in fp32; in bf16 it has to be as large as the gradients.
        scale = {"lr": 1e-2, "eps": 1e-2} if self.precision == "fp32" else {"lr": 1e-1, "eps": 1.0}
        optimizer = {**scale, "weight_decay": 0.1, "gradient_clipping": self.clipping}
        return check_config(
            {
                "name": "tiny",
                "implementation": self.implementation,
                "data": {"resolution": 8, "channels": 1},
                "diffusion": {"process": "edm", "p_mean": -0.5, "p_std": 0.5},
                "denoiser": {
                    **(UNET if self.unet else {"patch_size": 4, "hidden_size": 16, "num_heads": 2}),
                    **({"train": "difffit", "weights": "not read here"} if self.difffit else {}),
                    "depth": self.depth,
                    "num_classes": CLASSES,
                    "label_dropout": 0.25,
                },
                "structure_encoder": {"width": 8, "feature_dim": 8},
                "game": {"mode": self.mode, "lambda_s": 0.5, **self.game},
                "denoiser_optimizer": optimizer,
                "discriminator_optimizer": optimizer,
                "train": {
                    "steps": 10 * ITERATIONS,
                    "micro_batch": MICRO_BATCH,
                    "grad_accumulation": self.accumulation,
                    "precision": self.precision,
                    "compile": self.compiled,
                    "activation_checkpointing": self.checkpointing,
                },
                "deepspeed": {"zero_optimization": {"stage": self.stage, **self.zero}},
            }
        )


def cases(world_size: int) -> list[Case]:
    """What is compared with plain autograd in `make test`; `matrix` has the rest.

    One rank has nothing to divide, so it plays ZeRO stages 0 and 2 only.
    """
    everything = [
        Case(f"{mode}-zero{stage}-accumulation{a}", mode, stage, a)
        for mode in MODES
        for stage in STAGES
        for a in (1, 2)
    ]
    for stage in STAGES:
        zero = f"zero{stage}"
        everything += [
            Case(f"bf16-{zero}", "sadm", stage, precision="bf16"),
            Case(f"clipped-{zero}", "sadm", stage, 2, clipping=CLIP),
            Case(f"global-{zero}", "sadm", stage, 1, game={"scope": "global", "gate_log_snr": 0.5}),
        ]
    everything += [
        Case("reference-plain", "plain", 0, implementation="reference"),
        Case("reference-structure", "structure", 2, implementation="reference"),
        Case("reference-sadm-zero0", "sadm", 0, implementation="reference"),
        Case("reference-sadm-zero2-accumulation2", "sadm", 2, 2, implementation="reference"),
        Case("turns", "sadm", 0, game={"discriminator_steps": 2}),
        Case("turns-zero3", "sadm", 3, game={"discriminator_steps": 2}),
        Case("turns-accumulation2", "sadm", 2, 2, game={"discriminator_steps": 2}),
        Case("global-accumulation2", "sadm", 2, 2, game={"scope": "global"}),
        Case("global-structure", "structure", 1, game={"scope": "global", "same_class": True}),
        Case("ramp", "sadm", 1, game={"start_step": 1, "ramp_steps": 4}),
        Case("ramp-accumulation2", "structure", 0, 2, game={"start_step": 1, "ramp_steps": 4}),
        Case("tokens", "sadm", 2, game={"compare": "tokens", "stage": 1, "gate_log_snr": 0.5}),
        Case("tokens-zero3", "sadm", 3, 2, game={"compare": "tokens", "stage": 1}),
        Case("tokens-reference", "sadm", 2, implementation="reference", game={"compare": "tokens", "stage": 1}),
        Case("locations", "sadm", 0, 2, game={"compare": "locations", "same_class": True}),
        Case("features", "sadm", 2, game={"compare": "features", "gate_log_snr": 0.5}),
        Case("hidden", "structure", 2, 2, game={"look_at": "hidden", "compare": "tokens", "gate_log_snr": 0.5}),
        Case("hidden-samples", "structure", 0, game={"look_at": "hidden", "block": 2}, depth=3),
        Case("hidden-zero3", "structure", 3, game={"look_at": "hidden", "compare": "tokens"}),
        Case("strength", "sadm", 2, game={"strength": "gradient"}),
        Case("strength-accumulation2", "structure", 0, 2, game={"strength": "gradient", "compare": "features"}),
        Case("strength-zero3", "sadm", 3, game={"strength": "per_sample", "gate_log_snr": 0.5}),
        Case("stop", "sadm", 2, game={"stop_step": 2, "decay_steps": 2}),
        Case("warmup", "sadm", 2, game={"warmup_steps": 1, "ramp_steps": 4}),
        Case("warmup-zero3", "sadm", 3, 2, game={"warmup_steps": 1, "start_step": 1}),
        Case("shown", "sadm", 2, shown=True),
        Case("shown-accumulation2", "sadm", 0, 2, shown=True),
        Case("gate-same-class", "sadm", 0, game={"gate_log_snr": 0.5, "gate_slope": 2.0, "same_class": True}),
        # Three steps of 8 samples on one rank, 16 on two; 4 and 8 with one micro-batch.
        Case("queue", "sadm", 0, 2, game={"queue": 20}),
        Case("queue-global", "sadm", 2, game={"queue": 10, "scope": "global", "gate_log_snr": 0.5, "same_class": True}),
        Case("queue-reference", "structure", 2, implementation="reference", game={"queue": 8, "scope": "global"}),
        Case("bf16-structure", "structure", 0, precision="bf16"),
        Case("checkpointing-zero2-accumulation2", "sadm", 2, 2, checkpointing=True),
        Case("checkpointing-zero3", "sadm", 3, zero={"stage3_param_persistence_threshold": 0}, checkpointing=True),
        # As configs/imagenet*.json have it; buckets that several gradients fill, and one alone overflows.
        Case("overlap-zero1", "sadm", 1, zero={"overlap_comm": True, "reduce_bucket_size": 1000}),
        Case("overlap-zero2-accumulation2", "sadm", 2, 2, zero={"overlap_comm": True, "reduce_bucket_size": 1000}),
        Case("bf16-clipped-accumulation2", "sadm", 2, 2, precision="bf16", clipping=CLIP),
        Case("unet-zero0-accumulation2", "sadm", 0, 2, unet=True, checkpointing=True),
        Case("unet-zero2", "structure", 2, unet=True, zero={"reduce_bucket_size": 5000}),
        Case("unet-zero3", "plain", 3, unet=True, zero={"stage3_param_persistence_threshold": 0}),
        Case("difffit-zero0-accumulation2", "sadm", 0, 2, difffit=True, depth=2),
        Case("difffit-zero1", "sadm", 1, difffit=True, clipping=CLIP, checkpointing=True),
        Case("difffit-zero2", "sadm", 2, difffit=True, depth=2, zero={"reduce_bucket_size": 500}),
        Case("difffit-zero3", "structure", 3, difffit=True, zero={"stage3_param_persistence_threshold": 0}),
        *compiled_cases(world_size),
    ]
    return [case for case in everything if case.stage in stages(world_size)]


def compiled_cases(world_size: int) -> list[Case]:
    """Cases of `cases` with train.compile; their worker compiles without Inductor, that of `matrix` with it.

    Each takes seconds to be compiled, so one rank plays those of ZeRO stage 0 and two those of stage 2.
    """
    small = {"reduce_bucket_size": 2000}  # a flat parameter is smaller than a block
    everything = [
        Case("compiled", "sadm", 2, compiled=True, depth=3, zero=small),
        Case("compiled-accumulation2", "sadm", 0, 2, compiled=True, depth=3, zero=small, checkpointing=True),
        Case("compiled-bf16", "structure", 0, 1, "bf16", compiled=True, depth=3),
        Case("graphs", "sadm", 2, compiled="graphs", game={"discriminator_steps": 2}),
        Case("graphs-accumulation2", "sadm", 0, 2, compiled="graphs"),
    ]
    return [case for case in everything if case.stage == (0 if world_size == 1 else 2)]


def stages(world_size: int) -> tuple[int, ...]:
    """The ZeRO stages that `make test` plays on so many ranks."""
    return (0, 2) if world_size == 1 else STAGES


def matrix(world_size: int) -> list[Case]:
    """The rest of modes x ZeRO stages x accumulation x precision x compiled, where a stage can be compiled."""
    known = [replace(case, name="") for case in cases(world_size)]
    found = [Case("checkpointing-compiled", "sadm", 1, compiled=True, checkpointing=True)]
    for kind, mode, stage, a, precision, compiled in product(
        ("", "unet", "difffit"), MODES, STAGES, (1, 2), ("fp32", "bf16"), (False, True)
    ):
        unet, difffit = kind == "unet", kind == "difffit"
        case = Case("", mode, stage, a, precision, compiled=compiled, unet=unet, difffit=difffit)
        slow = compiled and kind and mode != "sadm"  # five graphs each
        if case not in known and not (compiled and stage == 3) and not slow:
            name = f"{kind}{'-' * bool(kind)}{mode}-zero{stage}-{a}-{precision}{'-compiled' * compiled}"
            found.append(replace(case, name=name))
    return found


def poisoned_cases(world_size: int) -> list[Case]:
    """Cases whose first iteration meets a NaN."""
    found = [
        Case(f"{mode}-zero{stage}-accumulation{a}", mode, stage, a)
        for mode in MODES
        for stage in stages(world_size)
        for a in (1, 2)
    ]
    for mode in MODES:
        found.append(Case(f"{mode}-reference", mode, 0, implementation="reference"))
    return [*found, Case("queue", "sadm", 2, 2, game={"queue": 20})]


def traced_cases(world_size: int) -> list[Case]:
    """Cases whose reductions are watched: four blocks of 4,700 weights, with and without compilation."""
    buckets = {"reduce_bucket_size": 5000, "overlap_comm": True}
    return [
        Case(f"zero{stage}{'-compiled' * compiled}", "plain", stage, compiled=compiled, depth=4, zero=buckets)
        for stage in (1, 2)
        for compiled in (False, True)
        if world_size > 1
    ]


# Whose gradient is NaN in each iteration: the first one finds no moments yet.
BAD_PLAYER = ("denoiser", None, "discriminator", "denoiser", None)


def bad_gradient_cases(world_size: int) -> list[Case]:
    """Cases for BAD_PLAYER."""
    return [
        *(Case(f"zero{stage}", "sadm", stage) for stage in stages(world_size)),
        *(Case(f"zero{stage}-accumulation2", "sadm", stage, 2) for stage in (0, 2)),
        *(Case(f"bf16-zero{stage}", "sadm", stage, precision="bf16") for stage in stages(world_size)),
        Case("turns-zero2", "sadm", 2, game={"discriminator_steps": 2}),
        Case("queue-zero2", "sadm", 2, game={"queue": 8}),
    ]


def see(samples: Tensor) -> Tensor:
    """Stands for a decoder: another size, and neither linear nor one pixel at a time."""
    return torch.nn.functional.interpolate(samples, scale_factor=2.0, mode="bilinear").tanh()


@torch.no_grad()
def starting_weights(module: nn.Module, seed: int) -> None:
    """Move every parameter off its initial value: a DiT as built is 0, with no gradient below its last layer."""
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        if p.requires_grad:
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.1)


def micro_batch(config: Config, iteration: int, micro_step: int, rank: int, world_size: int) -> Batch:
    """What `rank` gets: samples of class-dependent brightness under noise."""
    first = ((iteration * config.train.grad_accumulation + micro_step) * world_size + rank) * MICRO_BATCH
    ids = torch.arange(first, first + MICRO_BATCH)
    generator = torch.Generator().manual_seed(first)
    labels = ids % CLASSES
    x0 = 0.3 * torch.randn(MICRO_BATCH, 1, 8, 8, generator=generator) + 0.5 * (labels - 1)[:, None, None, None]
    return draw_batch(config, x0.clamp(-1, 1), labels, ids, null_class=CLASSES)
