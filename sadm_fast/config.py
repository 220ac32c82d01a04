"""A run's configuration: one strict JSON file. Every field is here, with its meaning, default and range.

Upper limits lie beyond what any machine holds: a larger number is a typing mistake. `_size_problem` limits products.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from sadm_fast.config_errors import explain, refuse_deepspeed_format
from sadm_fast.config_tree import (
    CHANGEABLE,
    LEARNING_RATES,
    override,
    read_object,
    without,
    without_later,
    without_retired,
)
from sadm_fast.diffusion import EDM, VP, Flow, Process
from sadm_fast.diffusion.process import Steps
from sadm_fast.diffusion.samplers import SAMPLERS, options_of, sampler_name
from sadm_fast.errors import UserError
from sadm_fast.files import expand_home
from sadm_fast.models.dit import parse_name

_MOST_STEPS = 10**9
_MOST_SAMPLER_STEPS = 10**5
_MOST_TOKENS = 2**20  # of one image
_MOST_BYTES = 2**40  # of one layer's output, in fp32


class Block(BaseModel):
    """Unknown keys and loose types are errors; a loaded configuration does not change."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def _expanded(path: str) -> str:
    try:
        return expand_home(path)
    except UserError as error:
        raise PydanticCustomError("home", "{reason}", {"reason": str(error).partition(": ")[2]}) from None


FilePath = Annotated[str, AfterValidator(_expanded)]  # or a name that is no path: demo:mnist5k, a hub id


class DataConfig(Block):
    path: FilePath = Field("demo:mnist5k", description="folder of the samples; demo:mnist5k is the embedded demo set")
    source: Literal["folder", "webdataset", "latents", "own"] = Field(
        "folder",
        description="folder: class/name.png; webdataset: tar shards; latents: what encode.py wrote; own: given to"
        " sadm_fast.train",
    )
    resolution: int = Field(
        16, ge=8, le=2**14, description="side of the square crop in pixels, also of the images behind latents"
    )
    channels: Literal[1, 3] = Field(1, description="1 grey, 3 colour")
    shape: tuple[Annotated[int, Field(ge=1, le=2**24)], ...] | None = Field(
        None,
        min_length=1,
        max_length=8,
        strict=False,
        description="own: of a sample, channels first, if it is no square image; sadm_fast.train fills it in",
    )
    flip: bool = Field(False, description="mirror half of the images; wrong for digits and text")
    enlarge: bool = Field(
        False, description="true: enlarge images smaller than the crop, as DiT does; false: count them as broken"
    )
    broken: Literal["refuse", "skip"] = Field(
        "refuse",
        description="refuse: decode every image once before training, and stop if one is broken;"
        " skip: replace a broken image when it is met, and count it",
    )
    loader: Literal["dali", "torch"] = Field("dali", description="dali: NVIDIA DALI; torch: PIL in torch workers")
    decode: Literal["auto", "mixed", "cpu"] = Field(
        "auto", description="where DALI decodes: mixed is JPEG on the GPU; auto is mixed if there is a GPU"
    )
    threads: int = Field(2, ge=1, le=1024, description="reading and decoding threads of each rank")
    prefetch: int = Field(2, ge=1, le=1024, description="batches prepared ahead")


class LatentsConfig(Block):
    """The latent space of data.source=latents, and how encode.py fills data.path."""

    autoencoder: FilePath = Field(
        "stabilityai/sd-vae-ft-ema", description="diffusers AutoencoderKL: a local folder or a hub id"
    )
    channels: int = Field(4, ge=1, le=1024, description="channels of a latent")
    downsample: int = Field(8, ge=1, le=1024, description="side of an image over the side of its latent")
    scale: float | None = Field(
        None, gt=0, le=1e6, description="scaled latent = scale * raw latent; null: the autoencoder's scaling_factor"
    )
    images: FilePath | None = Field(None, description="encode.py: folder of the images to encode")
    images_source: Literal["folder", "webdataset"] = Field("folder", description="encode.py: as data.source")
    dtype: Literal["float16", "float32"] = Field(
        "float16", description="encode.py: of the cached mean and standard deviation"
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="encode.py: arithmetic of the autoencoder")
    shard_size: int = Field(
        8192, ge=1, le=2**24, description="encode.py: images in a shard; a killed run loses at most one shard a rank"
    )
    batch: int = Field(32, ge=1, le=2**16, description="encode.py: images in one forward")


class VPConfig(Block):
    process: Literal["vp"]
    learn_sigma: bool = Field(False, description="predict the variance too, as DiT does")

    def build(self) -> Process:
        return VP(learn_sigma=self.learn_sigma)


class EDMConfig(Block):
    process: Literal["edm"]
    sigma_data: float = Field(0.5, ge=1e-6, le=1e6, description="standard deviation of the data")
    p_mean: float = Field(-1.2, ge=-50, le=50, description="mean of ln sigma in training")
    p_std: float = Field(1.2, gt=0, le=50, description="standard deviation of ln sigma in training")

    def build(self) -> Process:
        return EDM(sigma_data=self.sigma_data, p_mean=self.p_mean, p_std=self.p_std)


class FlowConfig(Block):
    process: Literal["flow"]
    t_mean: float = Field(0.0, ge=-50, le=50, description="mean of logit t in training")
    t_std: float = Field(0.0, ge=0, le=50, description="standard deviation of logit t in training; 0: uniform t")
    direction: Literal["noise", "data"] = Field(
        "noise",
        description="what the network is given and predicts; noise: 1000 t and eps - x0; data: 1 - t and x0 - eps, as"
        " SiT",
    )

    def build(self) -> Process:
        return Flow(t_mean=self.t_mean, t_std=self.t_std, to_data=self.direction == "data")


DENOISER_SIZES = ("patch_size", "hidden_size", "depth", "num_heads")  # given in numbers or by a name


class DenoiserConfig(Block):
    architecture: Literal["dit", "own"] = Field("dit", description="own: given to sadm_fast.train")
    name: str | None = Field(None, description='a published size, "DiT-S/4" .. "DiT-XL/2"; null: the four sizes below')
    patch_size: int = Field(4, ge=1, le=1024, description="side of the square that becomes one token")
    hidden_size: int = Field(128, ge=8, le=2**16, description="width of a token")
    depth: int = Field(4, ge=1, le=256, description="transformer blocks")
    num_heads: int = Field(4, ge=1, le=2**14, description="attention heads of a block")
    num_classes: int | None = Field(None, ge=1, le=2**24, description="null: the number of classes in the data")
    label_dropout: float = Field(0.1, ge=0, lt=1, description="share of labels replaced by the null class")
    weights: FilePath | None = Field(
        None,
        description="what to start from, for fine-tuning: safetensors or .pt with DiT's names, as DiT and SiT publish"
        " them, or a run's folder; the label table starts anew if it is for another number of classes, and a learned"
        " variance that is not asked for is left out",
    )
    weights_entry: Literal["ema", "model"] = Field(
        "ema", description="what to take of a train.py's .pt: the averaged weights, or those of its last step"
    )
    position_grid: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="weights of another resolution: positions are stretched from a grid of so many tokens a side, the"
        " one of the weights; null: tokens are counted",
    )

    @model_validator(mode="after")
    def _sizes(self) -> Self:
        if self.architecture == "own" and self.weights is not None:
            raise ValueError("weights: are for the networks of this program; load your own where you build it")
        if self.name is not None:
            try:
                parse_name(self.name)
            except ValueError as error:
                raise ValueError(f"name={error}") from None
            given = [size for size in DENOISER_SIZES if size in self.model_fields_set]
            if given:
                raise ValueError(f"name={self.name!r} fixes {', '.join(given)}: give one or the other")
        elif self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise ValueError(
                f"hidden_size={self.hidden_size}: must be a multiple of 4 and of num_heads={self.num_heads}"
            )
        return self

    @property
    def patch(self) -> int:
        """Side of a token's square, of the named or the given size."""
        return self.patch_size if self.name is None else parse_name(self.name)[3]

    @property
    def token_width(self) -> int:
        """Width of a token, of the named or the given size."""
        return self.hidden_size if self.name is None else parse_name(self.name)[1]


class ClassifierTraining(Block):
    steps: int = Field(400, ge=1, le=_MOST_STEPS, description="optimizer steps")
    batch: int = Field(128, ge=1, le=2**20, description="images in a step, over all ranks")
    lr: float = Field(1e-2, gt=0, le=1e6, description="highest learning rate of a warm-up and a cosine")
    weight_decay: float = Field(0.05, ge=0, le=1e6, description="AdamW's, on matrices and filters only")


class StructureEncoderConfig(Block):
    """Psi, which maps an image (or latent) to one feature row."""

    architecture: Literal["cnn", "resnet18", "vit", "own"] = Field(
        "cnn",
        description="cnn: three layers for small images; vit: a vision transformer in DINOv2's layout; own: given to"
        " sadm_fast.train",
    )
    input: Literal["samples", "pixels"] = Field(
        "samples",
        description="samples: what the denoiser is trained on; pixels: latents, decoded, with the gradient through the"
        " frozen decoder (needs weights)",
    )
    width: int = Field(
        32, ge=8, le=2**13, multiple_of=8, description="cnn: channels of the first layer; vit: of a token"
    )
    feature_dim: int = Field(
        64, ge=1, le=2**16, description="cnn: length of a feature row (resnet18: always 512; vit: width)"
    )
    stem: Literal["imagenet", "small"] = Field("imagenet", description="resnet18: small for images up to 64 pixels")
    norm: Literal["group", "frozen"] = Field(
        "group", description="resnet18: group norm, or batch norm with frozen statistics (for torchvision's weights)"
    )
    depth: int = Field(12, ge=1, le=256, description="vit: blocks")
    patch_size: int = Field(14, ge=1, le=1024, description="vit: side of a patch")
    input_size: int = Field(
        224, ge=1, le=2**14, description="vit: side that images are resized to; a multiple of patch_size"
    )
    position_grid: int = Field(
        37, ge=1, le=1024, description="vit: side of the weights' table of positions in patches (DINOv2: 37)"
    )
    registers: int = Field(0, ge=0, le=1024, description="vit: register tokens of the weights")
    weights: FilePath | None = Field(
        None,
        description="what to start from, safetensors or .pt; a classifier in it is left out; null: train on the data"
        " first",
    )
    pretrain: ClassifierTraining = Field(
        default_factory=lambda: ClassifierTraining(), description="Psi's training as a classifier, before the game"
    )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.architecture == "vit" and self.input_size % self.patch_size:
            raise ValueError(f"input_size={self.input_size}: must be a multiple of patch_size={self.patch_size}")
        if self.input == "pixels" and self.weights is None:
            raise ValueError(
                "input=pixels: needs weights; without, Psi would have to be trained on decoded images first"
            )
        return self


class GameConfig(Block):
    mode: Literal["plain", "structure", "sadm"] = Field(
        "sadm", description="plain: no game; structure: Psi stays as it is; sadm: the minimax game"
    )
    lambda_s: float = Field(0.3, ge=0, le=1e6, description="weight of S in the denoiser's loss")
    start_step: int = Field(0, ge=0, le=_MOST_STEPS, description="steps of plain training before the game starts")
    warmup_steps: int = Field(
        0,
        ge=0,
        le=_MOST_STEPS,
        description="first steps of the game, in which the discriminator learns alone: lambda_s and the denoiser's"
        " learning rate are 0",
    )
    ramp_steps: int = Field(0, ge=0, le=_MOST_STEPS, description="steps over which lambda_s then grows linearly from 0")
    decay_steps: int = Field(
        0,
        ge=0,
        le=_MOST_STEPS,
        description="last steps of the game, over which lambda_s falls linearly to 0",
    )
    stop_step: int | None = Field(
        None, ge=1, le=_MOST_STEPS, description="from this step on the training is plain again; null: never"
    )
    discriminator_steps: int = Field(1, ge=1, le=16, description="discriminator steps before each denoiser step")
    scope: Literal["rank", "global"] = Field(
        "rank", description="rank: pairs inside one rank's micro-batch; global: pairs over all ranks"
    )
    queue: int = Field(
        0, ge=0, le=2**24, description="past samples of all ranks with which S compares the batch, too; 0: none"
    )
    compare: Literal["samples", "tokens", "locations", "features"] = Field(
        "samples",
        description="relations of what: samples, by their pooled features; tokens, the locations of each sample's own"
        " feature map; locations, samples at each location of the map; features: no relations, each sample's pooled"
        " features with its own (a control)",
    )
    stage: int = Field(
        2,
        ge=1,
        le=256,
        description="tokens and locations: the stage of Psi whose maps are compared, from the image on (cnn: 3 stages,"
        " resnet18: 4, vit: its blocks); maps larger than 8x8 are averaged down to that",
    )
    strength: Literal["weight", "gradient"] = Field(
        "weight",
        description="what lambda_s is; weight: of S; gradient: the gradient of S in xhat0 gets lambda_s times"
        " the length of that of the denoising loss, in each micro-batch",
    )
    noise_levels: Literal["sample", "batch"] = Field(
        "sample",
        description="sample: each has its own; batch: all samples of a step share one (in plain training, too), and"
        " the gate then says how much its S counts",
    )
    relation: Literal["euclidean", "cosine", "gaussian"] = Field("euclidean", description="between two feature rows")
    penalty: Literal["squared", "absolute", "huber"] = Field("squared", description="of a difference of relations")
    normalize: Literal["unit", "mean", "none"] = Field(
        "unit", description="unit: L2-normalise features; mean: divide relations by their mean"
    )
    tau: float = Field(1.0, ge=1e-6, le=1e6, description="bandwidth of the gaussian relation")
    delta: float = Field(1.0, ge=1e-6, le=1e6, description="threshold of the huber penalty")
    gate_log_snr: float | None = Field(
        None, ge=-1e3, le=1e3, description="samples noisier than this log-SNR hardly count; null: all count alike"
    )
    gate_slope: float = Field(4.0, gt=0, le=1e6, description="steepness of the gate; large: a hard gate")
    same_class: bool = Field(False, description="compare only pairs of one class")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.stop_step is not None and self.stop_step <= self.start_step + self.warmup_steps:
            raise ValueError(
                f"stop_step={self.stop_step}: must be above start_step + warmup_steps ="
                f" {self.start_step + self.warmup_steps}, or null"
            )
        return self

    @model_validator(mode="after")
    def _comparable(self) -> Self:
        maps = self.compare in ("tokens", "locations")
        wrong = [
            (self.strength == "gradient" and self.scope == "global", "strength=gradient: needs scope=rank"),
            (
                self.noise_levels == "batch" and self.queue,
                "noise_levels=batch: needs queue=0",
            ),
            (self.compare != "samples" and self.queue, f"compare={self.compare}: needs queue=0"),
            (self.compare != "samples" and self.scope == "global", f"compare={self.compare}: needs scope=rank"),
            (self.compare != "samples" and self.normalize == "mean", f"compare={self.compare}: has no normalize=mean"),
            (
                self.compare in ("tokens", "features") and self.same_class,
                f"compare={self.compare}: pairs no samples",
            ),
            (self.compare == "features" and self.relation != "euclidean", "compare=features: needs relation=euclidean"),
            (not maps and self.stage != 2, f"stage={self.stage}: is for compare=tokens and locations"),
        ]
        if found := [reason for is_so, reason in wrong if is_so]:
            raise ValueError(found[0])
        return self

    def playing(self, step: int) -> bool:
        """Whether 0-based iteration `step` belongs to the game; before and after it the training is plain."""
        return self.mode != "plain" and self.start_step <= step and (self.stop_step is None or step < self.stop_step)


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
    warmup_steps: int = Field(0, ge=0, le=_MOST_STEPS, description="first steps, in which the rate grows linearly")
    decay_steps: int = Field(0, ge=0, le=_MOST_STEPS, description="last steps, in which the rate falls linearly to 0")
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
    steps: int = Field(1500, ge=1, le=_MOST_STEPS, description="denoiser steps of the whole run")
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
        description="on: torch.compile both players, a minute at the start, then faster; graphs: also replay them as"
        " CUDA graphs, not yet seen on a device; true and false are on and off",
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
        le=_MOST_STEPS,
        description="keep the power-function averages of each such checkpoint in snapshots/, for EMA lengths chosen"
        " after training; a multiple of checkpoint_every; null: none",
    )
    log_every: int = Field(10, ge=1, le=_MOST_STEPS, description="steps between lines of metrics.jsonl")
    sample_every: int = Field(250, ge=1, le=_MOST_STEPS, description="steps between sample grids")
    checkpoint_every: int = Field(250, ge=1, le=_MOST_STEPS, description="steps between checkpoints")
    keep_last: int = Field(2, ge=1, le=_MOST_STEPS, description="newest checkpoints that are kept")
    keep_every: int | None = Field(
        None, ge=1, le=_MOST_STEPS, description="also keep checkpoints at multiples of so many steps; null: none"
    )
    patience: float = Field(
        1800.0, gt=0, le=1e8, description="the run ends itself after so many seconds without a step, pictures or a save"
    )

    @property
    def profiles(self) -> tuple[PowerEMA | ExponentialEMA | ConstantEMA, ...]:
        """The averages' profiles; the first is the one that is sampled from."""
        return (self.ema, *self.more_ema)

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


def _steps(value: Any) -> Steps:
    """Check sampler steps: 18, "18", "ddim50", "10,15,20" or [10, 15, 20]."""
    counts: Any = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    numbers: list[Any] = [
        int(n) if isinstance(n, str) and re.fullmatch(r"[0-9]{1,6}", n.strip()) else n for n in counts
    ]
    if isinstance(value, str) and re.fullmatch("ddim[1-9][0-9]{0,5}", value):
        return value
    if not all(type(n) is int and 1 <= n <= _MOST_SAMPLER_STEPS for n in numbers) or not 1 <= len(numbers) <= 1e3:
        raise PydanticCustomError(
            "steps",
            'must be a whole number from 1 to {most}, "ddimN", or a list of such numbers',
            {"most": _MOST_SAMPLER_STEPS},
        )
    return numbers[0] if len(numbers) == 1 else tuple(numbers)


SamplerSteps = Annotated[
    Steps,
    PlainValidator(_steps),
    PlainSerializer(lambda steps: list(steps) if isinstance(steps, tuple) else steps),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1, "maximum": _MOST_SAMPLER_STEPS},
                {"type": "string"},
                {"type": "array", "items": {"type": "integer", "minimum": 1}, "minItems": 1},
            ]
        }
    ),
]


class SamplingConfig(Block):
    """How samples are drawn: the grids of a run, its evaluations (but for steps and guidance), sample.py's defaults."""

    sampler: Literal["auto", "heun", "ddim", "euler", "dpmpp_2m", "ddpm", "sde"] = Field(
        "auto", description="auto: heun for edm and flow, ddim for vp"
    )
    steps: SamplerSteps = Field(
        18,
        description="sampler steps; vp also: [10, 15, 20], so many of each third of the schedule, or ddim50, every 20th"
        " step from 0 (improved DDPM's respacing)",
    )
    guidance_scale: float = Field(1.0, ge=0, le=1e6, description="classifier-free guidance; 1: none")
    guidance_channels: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="guide so many channels, the first ones; null: all; DiT's release guides 3 of 4",
    )
    guidance_interval: tuple[float, float] | None = Field(
        None,
        strict=False,
        description="guide from the first to the second noise level only; edm: sigma, flow: t in 0..1, vp: t in 0..999",
    )
    clip_denoised: bool = Field(False, description="bring each estimate of the clean image into [-1, 1]; pixels only")
    eta: float = Field(0.0, ge=0, le=1, description="ddim: share of the noise that each step draws anew")
    variance: Literal["auto", "learned", "small", "large"] = Field(
        "auto", description="ddpm: of a step; auto: learned with diffusion.learn_sigma, else large"
    )
    churn: float = Field(0.0, ge=0, le=1e6, description="heun on edm: EDM's S_churn; 0: deterministic")
    churn_t_min: float = Field(0.0, ge=0, le=1e6, description="heun on edm: EDM's S_tmin, a sigma")
    churn_t_max: float = Field(1e6, ge=0, le=1e6, description="heun on edm: EDM's S_tmax, a sigma")
    churn_noise: float = Field(1.0, ge=0, le=10, description="heun on edm: EDM's S_noise")
    sde_noise: float = Field(1.0, ge=0, le=100, description="sde: its diffusion coefficient w(t) = sde_noise t; as SiT")
    sde_last_step: float = Field(0.04, gt=0, lt=1, description="sde: length of the last step, which adds no noise")
    columns: int = Field(10, ge=1, le=10**3, description="most classes in the grid")
    rows: int = Field(8, ge=1, le=10**3, description="samples of each class in the grid")

    def options(self, sampler: str) -> dict[str, Any]:
        """The settings that the sampler of this name (not "auto") takes."""
        return {name: getattr(self, name) for name in options_of(SAMPLERS[sampler][0])}


class EvaluateConfig(Block):
    """Frechet distances between samples and real images, during the run."""

    every: int | None = Field(None, ge=1, le=_MOST_STEPS, description="steps between evaluations; null: never")
    samples: int = Field(2000, ge=2, le=10**8, description="samples drawn for each evaluation")
    batch: int = Field(250, ge=1, le=2**20, description="samples drawn at a time")
    steps: int = Field(12, ge=1, le=10**5, description="sampler steps; no guidance")
    real_images: int = Field(10000, ge=4, le=10**8, description="most real images to compare with")
    judge: ClassifierTraining = Field(
        default_factory=lambda: ClassifierTraining(), description="training of the classifier behind fid_classifier"
    )


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


class Config(Block):
    schema_file: str | None = Field(None, alias="$schema", description="where editors find the JSON Schema")
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="the run's folder is runs/NAME")
    seed: int = Field(0, ge=0, lt=2**64, description="of every random number, with the sample's number")
    implementation: Literal["fast", "reference"] = Field(
        "fast", description="reference: straightforward PyTorch, no fusion, no reuse, eager"
    )
    data: DataConfig = Field(default_factory=lambda: DataConfig())
    latents: LatentsConfig | None = Field(None, description="needed for data.source=latents, and only there")
    diffusion: Annotated[EDMConfig | VPConfig | FlowConfig, Field(discriminator="process")] = Field(
        default_factory=lambda: EDMConfig(process="edm")
    )
    denoiser: DenoiserConfig = Field(default_factory=lambda: DenoiserConfig())
    structure_encoder: StructureEncoderConfig = Field(default_factory=lambda: StructureEncoderConfig())
    game: GameConfig = Field(default_factory=lambda: GameConfig())
    denoiser_optimizer: OptimizerConfig = Field(default_factory=lambda: OptimizerConfig())
    discriminator_optimizer: OptimizerConfig = Field(default_factory=lambda: OptimizerConfig(lr=1e-6))
    train: TrainConfig = Field(default_factory=lambda: TrainConfig())
    logging: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = Field(
        ("tensorboard",),
        strict=False,
        description="where the numbers of metrics.jsonl go as well; wandb and trackio have to be installed, and are"
        " offline until WANDB_MODE and the like say otherwise",
    )
    sampling: SamplingConfig = Field(default_factory=lambda: SamplingConfig())
    evaluate: EvaluateConfig = Field(default_factory=lambda: EvaluateConfig())
    deepspeed: DeepSpeedConfig = Field(default_factory=lambda: DeepSpeedConfig())

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if (problem := _shape_problem(self)) is not None:
            raise ValueError(problem)
        if (self.data.source == "latents") != (self.latents is not None):
            raise ValueError(
                f"data.source={self.data.source}: "
                + ("needs a latents block" if self.latents is None else "the latents block is for data.source=latents")
            )
        if self.structure_encoder.input == "pixels" and self.latents is None:
            raise ValueError("structure_encoder.input=pixels: decodes latents, and samples are pixels; use samples")
        if self.latents is not None and self.evaluate.every is not None:
            raise ValueError(
                "evaluate.every: the judges compare pixels; with data.source=latents it must be null"
                " (sample.py --folder writes images for other evaluators)"
            )
        if self.data.shape is not None and self.evaluate.every is not None:
            raise ValueError(
                f"evaluate.every={self.evaluate.every}: the judges compare images; with data.shape it must be null"
                " (sadm_fast.load draws samples for a judge of your own)"
            )
        if (problem := _sampling_problem(self)) is not None:
            raise ValueError(problem)
        if self.game.mode != "plain" and self.train.micro_batch < 2 and not self.game.queue:
            raise ValueError(
                "train.micro_batch=1: the game compares pairs, so it needs at least 2"
                " (or a game.queue, or game.mode=plain)"
            )
        if self.game.warmup_steps and self.game.mode != "sadm":
            raise ValueError(
                f"game.warmup_steps={self.game.warmup_steps}: is the discriminator's, and game.mode={self.game.mode}"
                " trains none; it must be 0"
            )
        psi = self.structure_encoder
        stages = {"cnn": 3, "resnet18": 4, "vit": psi.depth}.get(psi.architecture)
        if stages is not None and self.game.stage > stages:
            raise ValueError(f"game.stage={self.game.stage}: {psi.architecture} has {stages}")
        samples = self.train.micro_batch * self.train.grad_accumulation
        if self.game.queue and self.game.mode == "plain":
            raise ValueError(f"game.queue={self.game.queue}: game.mode=plain compares nothing; it must be 0")
        if 0 < self.game.queue < samples:  # with several ranks engine.feature_queue.check_queue asks for more
            raise ValueError(f"game.queue={self.game.queue}: must be 0, or at least the {samples} samples of a step")
        if self.train.compile != "off" and self.implementation == "reference":
            raise ValueError(
                f"train.compile={self.train.compile}: implementation=reference is eager; use fast, or train.compile=off"
            )
        if (problem := _size_problem(self)) is not None:
            raise ValueError(problem)
        return self

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """[C, ...] of what the denoiser sees: [C, H, W] of an image or a latent."""
        data, latents = self.data, self.latents
        if data.shape is not None:
            return data.shape
        if latents is None:
            return data.channels, data.resolution, data.resolution
        side = data.resolution // latents.downsample
        return latents.channels, side, side

    @property
    def psi_shape(self) -> tuple[int, ...]:
        """[C, ...] of what Psi sees: a sample, or the pixels of one."""
        if self.structure_encoder.input == "samples":
            return self.sample_shape
        return self.data.channels, self.data.resolution, self.data.resolution

    @property
    def process(self) -> Process:
        return self.diffusion.build()

    def resolved(self) -> dict[str, Any]:
        """Every field that has a say, with its value, for json.dumps; `check_config` makes the same Config of it."""
        tree = self.model_dump(mode="json", exclude={"schema_file"})
        named = self.denoiser.name is not None or self.denoiser.architecture == "own"
        return without(tree, (f"denoiser.{size}" for size in DENOISER_SIZES)) if named else tree

    def fingerprint(self) -> str:
        """sha256 over the fields that must stay the same when a run is resumed."""
        return _digest(without_later(without(self.resolved(), CHANGEABLE)))

    def first_fingerprint(self) -> str:
        """The fingerprint as the first versions wrote it into checkpoints: with the learning rates."""
        changeable = (path for path in CHANGEABLE if path not in LEARNING_RATES)
        return _digest(without_later(without(self.resolved(), changeable)))


def _digest(tree: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _sampling_problem(config: Config) -> str | None:
    """Say which setting of the sampler fits neither it nor the process; None if all do."""
    sampling, process = config.sampling, config.process
    try:
        name = sampler_name(sampling.sampler, process)
    except ValueError as error:
        return f"sampling.sampler={error}"
    for key, steps in (("sampling", sampling.steps), ("evaluate", config.evaluate.steps)):
        try:
            process.sampling_levels(steps)
        except ValueError as error:
            return f"{key}.steps={error}"
    taken = sampling.options(name)
    for other, (sampler, _) in SAMPLERS.items():
        for option in options_of(sampler):
            value = getattr(sampling, option)
            if option not in taken and value != SamplingConfig.model_fields[option].default:
                return f"sampling.{option}={value}: is for sampling.sampler={other}, here it is {name}"
    if sampling.churn and not isinstance(process, EDM):
        return f"sampling.churn={sampling.churn:g}: raises the noise level sigma of edm; here the process is flow"
    learned = isinstance(process, VP) and process.learn_sigma
    if sampling.variance == "learned" and not learned:
        return "sampling.variance=learned: needs diffusion.learn_sigma=true"
    channels = config.sample_shape[0]
    if sampling.guidance_channels is not None and sampling.guidance_channels > channels:
        return f"sampling.guidance_channels={sampling.guidance_channels}: a sample has {channels}"
    if (
        sampling.guidance_interval is not None
        and not 0 <= sampling.guidance_interval[0] < sampling.guidance_interval[1]
    ):
        return (
            f"sampling.guidance_interval={list(sampling.guidance_interval)}: must be two noise levels, the lower first"
        )
    if sampling.clip_denoised and config.data.shape is not None:
        return "sampling.clip_denoised=true: clips pixels to [-1, 1]; with data.shape samples are no images"
    if sampling.clip_denoised and config.latents is not None:
        return "sampling.clip_denoised=true: clips pixels to [-1, 1]; latents have no such range"
    return None


def _shape_problem(config: Config) -> str | None:
    """Say why samples of this shape cannot go through the chosen networks; None if they can."""
    data, patch = config.data, config.denoiser.patch
    if data.shape is not None:
        if data.source != "own":
            return f"data.shape={list(data.shape)}: is for data.source=own"
        square = len(data.shape) == 3 and data.shape[1] == data.shape[2]
        if config.denoiser.architecture == "dit" and not (square and data.shape[1] % patch == 0):
            return (
                f"data.shape={list(data.shape)}: denoiser.architecture=dit takes [C, S, S], S a multiple of the patch"
                f" size {patch}; give sadm_fast.train a denoiser of your own"
            )
        if config.game.mode != "plain" and config.structure_encoder.architecture != "own" and len(data.shape) != 3:
            return (
                f"data.shape={list(data.shape)}: structure_encoder.architecture={config.structure_encoder.architecture}"
                " takes [C, H, W]; give sadm_fast.train an encoder of your own"
            )
        return None
    if config.denoiser.architecture == "own":
        return None
    cell = patch if config.latents is None else patch * config.latents.downsample
    if data.resolution % cell:
        allowed = f"the patch size {patch}"
        if config.latents is not None:
            allowed = f"{cell}, the patch size {patch} on {config.latents.downsample}x smaller latents"
        return f"data.resolution={data.resolution}: must be a multiple of {allowed}"
    return None


def _size_problem(config: Config) -> str | None:
    """Say which number makes one layer's output larger than any machine holds; None if none does."""
    shape, psi, sampling = config.sample_shape, config.structure_encoder, config.sampling
    denoise = encode = math.prod(shape)  # nothing more is known of a network that the caller gives
    if config.denoiser.architecture == "dit":
        tokens = (shape[1] // config.denoiser.patch) ** 2
        if tokens > _MOST_TOKENS:
            return (
                f"data.resolution={config.data.resolution}: is {tokens:,} tokens of {config.denoiser.patch} pixels a"
                f" side; at most {_MOST_TOKENS:,} (a larger patch, or a lower resolution)"
            )
        denoise = 4 * config.denoiser.token_width * tokens  # of the MLP, the widest
    if psi.architecture == "vit":
        encode = max(3 * psi.input_size**2, 4 * psi.width * (psi.input_size // psi.patch_size) ** 2)
    elif psi.architecture != "own":
        channels = max(config.psi_shape[0], 64 if psi.architecture == "resnet18" else psi.width)
        encode = math.prod(config.psi_shape[1:]) * channels
    for key, samples, elements in (
        ("train.micro_batch", config.train.micro_batch, denoise if config.game.mode == "plain" else denoise + encode),
        ("structure_encoder.pretrain.batch", psi.pretrain.batch, encode),
        ("sampling.rows", sampling.columns * sampling.rows, denoise),
        ("evaluate.batch", config.evaluate.batch, denoise),
        ("evaluate.judge.batch", config.evaluate.judge.batch, math.prod(shape[1:]) * 64),
    ):
        if 4 * samples * elements > _MOST_BYTES:
            return (
                f"{key}={samples if key != 'sampling.rows' else sampling.rows}: {samples:,} samples at once make one"
                f" layer's output {4 * samples * elements / 2**40:,.0f} TiB in fp32; at most {_MOST_BYTES // 2**40}"
            )
    return None


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read, override (`key.path=value`, value in JSON or a bare string) and check a configuration.

    Raises:
        UserError: one line with the key's path, its value and what is allowed.
    """
    raw = read_object(path)
    refuse_deepspeed_format(path, raw)
    for text in overrides:
        override(raw, text)
    return check_config(raw)


def check_config(raw: Mapping[str, Any]) -> Config:
    """Make a Config of plain data; UserError as in `load_config`."""
    try:
        return Config.model_validate(without_retired(raw))
    except ValidationError as error:
        problems = error.errors()
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(explain(problems[0], Config) + more) from None


def json_schema() -> dict[str, Any]:
    """JSON Schema of a configuration file, for editors."""
    return Config.model_json_schema(by_alias=True)
