"""The configuration's blocks about optimizers, averages, the loop and DeepSpeed."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from sadm_fast.config_block import MOST_STEPS, Block

Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Block):
    type: Literal["adamw", "apex_fused_adam"] = Field(
        "adamw",
        description="adamw: as torch's, in one pass; apex_fused_adam: NVIDIA apex's FusedAdam, needs apex and a GPU",
    )
    lr: float = Field(1e-4, gt=0, le=1e6, description="learning rate")
    betas: tuple[Beta, Beta] = Field((0.9, 0.99), strict=False, description="decay of the two moments")
    eps: float = Field(1e-8, gt=0, le=1e6, description="added to the root of the second moment")
    weight_decay: float = Field(0.0, ge=0, le=1e6, description="AdamW's")
    warmup_steps: int = Field(0, ge=0, le=MOST_STEPS, description="first steps, in which the rate grows linearly")
    decay_steps: int = Field(0, ge=0, le=MOST_STEPS, description="last steps, in which the rate falls linearly to 0")
    gradient_clipping: float = Field(0.0, ge=0, le=1e6, description="largest norm of the gradient; 0: no clipping")


class PowerEMA(Block):
    """EDM2's power-function EMA: its length is a share of the training so far."""

    profile: Literal["power"]
    std: float = Field(0.1, ge=1e-3, lt=0.28, description="relative width, EDM2's sigma_rel")

    @property
    def label(self) -> str:
        return f"power-{self.std:g}"


class ExponentialEMA(Block):
    """A constant decay, ramped up: the initialisation would stay in it for 1 / (1 - decay) steps."""

    profile: Literal["exponential"]
    decay: float = Field(0.9999, gt=0, lt=1, description="share of the average that stays in a step")

    @property
    def label(self) -> str:
        return f"exponential-{self.decay:g}"


class ConstantEMA(Block):
    """A constant decay from the initialisation on, as DiT's train.py."""

    profile: Literal["constant"]
    decay: float = Field(0.9999, gt=0, lt=1, description="share of the average that stays in a step")

    @property
    def label(self) -> str:
        return f"constant-{self.decay:g}"


EMAProfile = Annotated[PowerEMA | ExponentialEMA | ConstantEMA, Field(discriminator="profile")]


def _on_or_off(value: Any) -> Any:
    """`train.compile` was a truth value once."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


class TrainConfig(Block):
    steps: int = Field(1500, ge=1, le=MOST_STEPS, description="denoiser steps of the whole run")
    micro_batch: int = Field(128, ge=1, le=2**20, description="samples of one forward on one rank")
    grad_accumulation: int = Field(1, ge=1, le=1024, description="micro-batches in a step")
    precision: Literal["fp32", "bf16", "auto"] = Field(
        "fp32",
        description="of weights and arithmetic, beside fp32 master weights; auto: bf16 if a matrix product is quicker"
        " in it where the run starts",
    )
    compile: Annotated[
        Literal["off", "on", "graphs"],
        BeforeValidator(_on_or_off, json_schema_input_type=Literal["off", "on", "graphs"] | bool),
    ] = Field(
        "off",
        description="on: torch.compile the players' blocks, some seconds at the start, then faster; graphs: also replay"
        " both as CUDA graphs, not yet seen on a device; true and false are on and off",
    )
    activation_checkpointing: bool = Field(
        False, description="compute each denoiser block anew in the backward pass: less memory, a third more FLOPs"
    )
    ema: EMAProfile = Field(
        default_factory=lambda: PowerEMA(profile="power"),
        description="average of the denoiser's weights, the one that is sampled from",
    )
    more_ema: tuple[EMAProfile, ...] = Field(
        (), max_length=3, strict=False, description="further averages of it, kept in checkpoints: evaluate.py --sweep"
    )
    ema_snapshot_every: int | None = Field(
        None,
        ge=1,
        le=MOST_STEPS,
        description="keep the power-function averages of each such checkpoint in snapshots/, for EMA lengths chosen"
        " after training; a multiple of checkpoint_every; null: none",
    )
    log_every: int = Field(10, ge=1, le=MOST_STEPS, description="steps between lines of metrics.jsonl")
    sample_every: int = Field(250, ge=1, le=MOST_STEPS, description="steps between sample grids")
    checkpoint_every: int = Field(250, ge=1, le=MOST_STEPS, description="steps between checkpoints")
    keep_last: int = Field(2, ge=1, le=MOST_STEPS, description="newest checkpoints that are kept")
    keep_every: int | None = Field(
        None, ge=1, le=MOST_STEPS, description="also keep checkpoints at multiples of so many steps; null: none"
    )
    patience: float = Field(
        1800.0, gt=0, le=1e8, description="the run ends itself after so many seconds without a step, pictures or a save"
    )

    @property
    def profiles(self) -> tuple[PowerEMA | ExponentialEMA | ConstantEMA, ...]:
        """The averages' profiles; the first is the one that is sampled from."""
        return (self.ema, *self.more_ema)

    def profile(self, which: float | str) -> PowerEMA | ExponentialEMA | ConstantEMA | None:
        """The average of this width (of a power-function one) or label; None: the run keeps none such."""
        label = which if isinstance(which, str) else f"power-{which:g}"
        return next((profile for profile in self.profiles if profile.label == label), None)

    @model_validator(mode="after")
    def _averages(self) -> Self:
        labels = [profile.label for profile in self.profiles]
        if len(set(labels)) < len(labels):
            raise ValueError(f"more_ema: {', '.join(labels[1:])}: an average twice, ema is {labels[0]}")
        every = self.ema_snapshot_every
        if every is not None and every % self.checkpoint_every:
            raise ValueError(
                f"ema_snapshot_every={every}: must be a multiple of checkpoint_every={self.checkpoint_every}"
            )
        if every is not None and not any(isinstance(profile, PowerEMA) for profile in self.profiles):
            raise ValueError(f"ema_snapshot_every={every}: needs an ema of profile power")
        return self

    def due(self, step: int, every: int) -> bool:
        """Whether what happens every so many steps, and at the end, happens after `step` steps."""
        return step % every == 0 or step == self.steps


class OffloadConfig(Block):
    device: Literal["none", "cpu"] = Field("none", description="cpu: keep it in the host's memory")
    pin_memory: bool = Field(False, description="page-locked host memory: faster copies from and to a GPU")


_STAGE_3 = 10**15  # a number of elements that no network reaches


class ZeroConfig(Block):
    """DeepSpeed's zero_optimization block, for both engines; its pages explain the fields. Sizes in elements."""

    stage: Literal[0, 1, 2, 3] = Field(
        0, description="what the ranks divide: 0 nothing, 1 optimizer state, 2 also gradients, 3 also weights"
    )
    overlap_comm: bool | None = Field(None, description="communicate during the backward pass; null: at stage 3")
    reduce_bucket_size: int | None = Field(
        None, ge=1, le=10**10, description="null: 50 million on GPUs, 2 million on CPUs"
    )
    allgather_bucket_size: int | None = Field(
        None, ge=1, le=10**10, description="even at stages 1 and 2; null: 500 million on GPUs, 2 million on CPUs"
    )
    offload_optimizer: OffloadConfig | None = Field(None, description="optimizer state; stages 1 to 3")
    offload_param: OffloadConfig | None = Field(None, description="weights; stage 3")
    stage3_max_live_parameters: int = Field(10**9, ge=0, le=_STAGE_3)
    stage3_max_reuse_distance: int = Field(10**9, ge=0, le=_STAGE_3)
    stage3_prefetch_bucket_size: int = Field(50_000_000, ge=0, le=_STAGE_3)
    stage3_param_persistence_threshold: int = Field(100_000, ge=0, le=_STAGE_3)

    @model_validator(mode="after")
    def _accepted(self) -> Self:
        """Check what DeepSpeed asserts later, in a traceback."""
        if self.offload_param is not None and self.stage != 3:
            raise ValueError(f"offload_param: needs stage 3, not {self.stage}")
        if self.offload_optimizer is not None and self.stage == 0:
            raise ValueError("offload_optimizer: needs stage 1, 2 or 3, not 0")
        if self.stage in (1, 2) and (self.allgather_bucket_size or 0) % 2:
            raise ValueError(f"allgather_bucket_size={self.allgather_bucket_size}: must be even at stage {self.stage}")
        return self

    def buckets(self, device_type: str) -> dict[str, int]:
        """Both bucket sizes. DeepSpeed takes all memory of the first for small models too; CPUs: what caches hold."""
        reduce, gather = (2_000_000, 2_000_000) if device_type == "cpu" else (50_000_000, 500_000_000)
        return {
            "reduce_bucket_size": self.reduce_bucket_size or reduce,
            "allgather_bucket_size": self.allgather_bucket_size or gather,
        }


class DeepSpeedConfig(Block):
    """What is handed to DeepSpeed as it stands; all else in its dictionaries is derived from this file."""

    zero_optimization: ZeroConfig = Field(default_factory=lambda: ZeroConfig())
