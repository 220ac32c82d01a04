"""A run's configuration: one strict JSON file. Every field is here, with its meaning, default and range."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from sadm_fast.config_errors import explain, override, refuse_deepspeed_format
from sadm_fast.diffusion import EDM, VP, Flow, Process
from sadm_fast.diffusion.samplers import find_sampler
from sadm_fast.errors import UserError
from sadm_fast.files import expand_home
from sadm_fast.models.dit import parse_name


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
    path: FilePath = Field("demo:mnist5k", description="where the samples are; demo:mnist5k is the embedded demo set")
    source: Literal["folder", "webdataset", "latents"] = Field(
        "folder", description="folder: class/name.png; webdataset: tar shards; latents: what encode.py wrote"
    )
    resolution: int = Field(16, ge=8, description="side of the square crop, pixels (also of the images behind latents)")
    channels: Literal[1, 3] = Field(1, description="1 grey, 3 colour")
    flip: bool = Field(False, description="mirror half of the images; wrong for digits and text")
    enlarge: bool = Field(
        False, description="enlarge images smaller than the crop, as DiT does; false: they are broken"
    )
    broken: Literal["refuse", "skip"] = Field(
        "refuse", description="refuse: decode all images once before training; skip: replace and count when met"
    )
    loader: Literal["dali", "torch"] = Field("dali", description="DALI, or PIL in torch workers")
    decode: Literal["auto", "mixed", "cpu"] = Field("auto", description="DALI: mixed decodes JPEG on the GPU")
    threads: int = Field(2, ge=1, description="reading and decoding threads of each rank")
    prefetch: int = Field(2, ge=1, description="batches prepared ahead")


class LatentsConfig(Block):
    """The latent space of data.source=latents, and how encode.py fills data.path."""

    autoencoder: FilePath = Field(
        "stabilityai/sd-vae-ft-ema", description="diffusers AutoencoderKL: a local folder or a hub id"
    )
    channels: int = Field(4, ge=1, description="channels of a latent")
    downsample: int = Field(8, ge=1, description="pixels of the image a side of a latent's pixel")
    scale: float | None = Field(None, gt=0, description="scaled = scale * raw; null: the autoencoder's scaling_factor")
    images: FilePath | None = Field(None, description="encode.py: the images that data.path is made from")
    images_source: Literal["folder", "webdataset"] = "folder"
    dtype: Literal["float16", "float32"] = Field("float16", description="encode.py: of the cached mean and deviation")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="encode.py: of the autoencoder's arithmetic")
    shard_size: int = Field(8192, ge=1, description="encode.py: images a shard; a killed run redoes at most one")
    batch: int = Field(32, ge=1, description="encode.py: images of one forward")


class VPConfig(Block):
    process: Literal["vp"]
    learn_sigma: bool = Field(False, description="predict the variance too, as DiT does")

    def build(self) -> Process:
        return VP(learn_sigma=self.learn_sigma)


class EDMConfig(Block):
    process: Literal["edm"]
    sigma_data: float = Field(0.5, gt=0, description="standard deviation of the data")
    p_mean: float = Field(-1.2, description="mean of ln sigma in training")
    p_std: float = Field(1.2, gt=0, description="standard deviation of ln sigma in training")

    def build(self) -> Process:
        return EDM(sigma_data=self.sigma_data, p_mean=self.p_mean, p_std=self.p_std)


class FlowConfig(Block):
    process: Literal["flow"]
    t_mean: float = Field(0.0, description="mean of logit t in training")
    t_std: float = Field(0.0, ge=0, description="deviation of logit t; 0 means uniform t")

    def build(self) -> Process:
        return Flow(t_mean=self.t_mean, t_std=self.t_std)


DENOISER_SIZES = ("patch_size", "hidden_size", "depth", "num_heads")  # given in numbers or by a name


class DenoiserConfig(Block):
    name: str | None = Field(None, description='a published size, "DiT-S/4" .. "DiT-XL/2"; or give the sizes below')
    patch_size: int = Field(4, ge=1)
    hidden_size: int = Field(128, ge=8)
    depth: int = Field(4, ge=1)
    num_heads: int = Field(4, ge=1)
    num_classes: int | None = Field(None, ge=1, description="null: the number of class folders")
    label_dropout: float = Field(0.1, ge=0, lt=1, description="share of labels replaced by the null class")
    weights: FilePath | None = Field(
        None, description="safetensors file to start from (fine-tuning); labels of another number of classes start anew"
    )

    @model_validator(mode="after")
    def _sizes(self) -> Self:
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
        return self.patch_size if self.name is None else parse_name(self.name)[3]


class ClassifierTraining(Block):
    steps: int = Field(400, ge=1, description="optimizer steps")
    batch: int = Field(128, ge=1, description="images a step, over all ranks")
    lr: float = Field(1e-2, gt=0)
    weight_decay: float = Field(0.05, ge=0)


class StructureEncoderConfig(Block):
    architecture: Literal["cnn", "resnet18"] = Field("cnn", description="cnn: three layers for small images")
    width: int = Field(32, ge=8, multiple_of=8, description="cnn: channels of the first layer")
    feature_dim: int = Field(64, ge=1, description="cnn: length of a feature row (resnet18 has 512)")
    stem: Literal["imagenet", "small"] = Field("imagenet", description="resnet18: small for images up to 64 pixels")
    norm: Literal["group", "frozen"] = Field(
        "group", description="resnet18: frozen is needed for torchvision's weights"
    )
    weights: FilePath | None = Field(None, description="safetensors file to start from; null: train on the data first")
    pretrain: ClassifierTraining = Field(default_factory=lambda: ClassifierTraining())


class GameConfig(Block):
    mode: Literal["plain", "structure", "sadm"] = Field(
        "sadm", description="plain: no game; structure: Psi fixed; sadm: the minimax game"
    )
    lambda_s: float = Field(0.3, ge=0, description="weight of S in the denoiser's loss")
    start_step: int = Field(0, ge=0, description="plain training before the game starts")
    ramp_steps: int = Field(0, ge=0, description="lambda_s grows linearly over so many steps")
    discriminator_steps: int = Field(1, ge=1, description="discriminator steps a denoiser step")
    scope: Literal["rank", "global"] = Field("rank", description="pairs inside a rank's micro-batch, or over all ranks")
    queue: int = Field(0, ge=0, description="past samples of all ranks that S compares a batch with as well; 0: none")
    relation: Literal["euclidean", "cosine", "gaussian"] = "euclidean"
    penalty: Literal["squared", "absolute", "huber"] = "squared"
    normalize: Literal["unit", "mean", "none"] = "unit"
    tau: float = Field(1.0, gt=0, description="bandwidth of the gaussian relation")
    delta: float = Field(1.0, gt=0, description="threshold of the huber penalty")
    gate_log_snr: float | None = Field(
        None, description="pairs noisier than this log-SNR hardly count; null: all pairs count alike"
    )
    gate_slope: float = Field(4.0, gt=0, description="steepness of the gate; large: a hard gate")
    same_class: bool = Field(False, description="compare only pairs of one class")


Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Block):
    type: Literal["adamw", "apex_fused_adam"] = Field("adamw", description="apex's FusedAdam needs apex and a GPU")
    lr: float = Field(1e-4, gt=0)
    betas: tuple[Beta, Beta] = Field((0.9, 0.99), strict=False)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    warmup_steps: int = Field(0, ge=0, description="the learning rate grows linearly over so many steps")
    decay_steps: int = Field(0, ge=0, description="and falls linearly to 0 over the last so many steps of the run")
    gradient_clipping: float = Field(0.0, ge=0, description="largest norm of the gradient; 0: no clipping")


class PowerEMA(Block):
    """EDM2's power-function EMA: its length is a share of the training so far."""

    profile: Literal["power"]
    std: float = Field(0.1, gt=0, lt=0.28, description="relative width, EDM2's sigma_rel")


class ExponentialEMA(Block):
    profile: Literal["exponential"]
    decay: float = Field(0.9999, gt=0, lt=1)


class TrainConfig(Block):
    steps: int = Field(1500, ge=1, description="denoiser steps of the whole run")
    micro_batch: int = Field(128, ge=1, description="samples of one forward on one rank")
    grad_accumulation: int = Field(1, ge=1, description="micro-batches a step")
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = Field(False, description="torch.compile both players; minutes at the start, then faster")
    activation_checkpointing: bool = Field(
        False, description="compute each denoiser block anew in the backward pass: less memory, a third more FLOPs"
    )
    ema: Annotated[PowerEMA | ExponentialEMA, Field(discriminator="profile")] = Field(
        default_factory=lambda: PowerEMA(profile="power")
    )
    log_every: int = Field(10, ge=1, description="steps between lines of metrics.jsonl")
    sample_every: int = Field(250, ge=1, description="steps between sample grids")
    checkpoint_every: int = Field(250, ge=1)
    keep_last: int = Field(2, ge=1, description="newest checkpoints kept")
    keep_every: int | None = Field(None, ge=1, description="and those at multiples of so many steps; null: none")
    patience: float = Field(
        1800.0, gt=0, description="seconds without progress (a step, pictures, a save) after which the run ends itself"
    )

    def due(self, step: int, every: int) -> bool:
        """Whether what happens every so many steps, and at the end, happens after `step` steps."""
        return step % every == 0 or step == self.steps


class SamplingConfig(Block):
    sampler: Literal["auto", "heun", "ddim"] = Field("auto", description="auto: heun for edm and flow, ddim for vp")
    steps: int = Field(18, ge=1, description="steps of the deterministic sampler")
    guidance_scale: float = Field(1.0, ge=0, description="classifier-free guidance on all channels; 1: none")
    columns: int = Field(10, ge=1, description="classes of the grid, at most")
    rows: int = Field(8, ge=1, description="samples of each class in the grid")


class EvaluateConfig(Block):
    every: int | None = Field(None, ge=1, description="steps between Frechet distances; null: never")
    samples: int = Field(2000, ge=2)
    batch: int = Field(250, ge=1)
    steps: int = Field(12, ge=1, description="sampler steps for evaluation; no guidance")
    real_images: int = Field(10000, ge=4, description="real images compared with, at most")
    judge: ClassifierTraining = Field(default_factory=lambda: ClassifierTraining())


class OffloadConfig(Block):
    device: Literal["none", "cpu", "nvme"] = "none"
    pin_memory: bool = False
    nvme_path: FilePath | None = None


class ZeroConfig(Block):
    """DeepSpeed's zero_optimization block, for both engines."""

    stage: Literal[0, 1, 2, 3] = 0
    overlap_comm: bool | None = None
    contiguous_gradients: bool = True
    reduce_bucket_size: int | None = Field(
        None, ge=1, description="null: 50 million elements on GPUs, 2 million on CPUs"
    )
    allgather_bucket_size: int | None = Field(None, ge=1, description="null: 500 million, or 2 million on CPUs")
    offload_optimizer: OffloadConfig | None = None
    offload_param: OffloadConfig | None = None
    stage3_max_live_parameters: int = Field(1_000_000_000, ge=0)
    stage3_max_reuse_distance: int = Field(1_000_000_000, ge=0)
    stage3_prefetch_bucket_size: int = Field(50_000_000, ge=0)
    stage3_param_persistence_threshold: int = Field(100_000, ge=0)

    def buckets(self, device_type: str) -> dict[str, int]:
        """Both sizes in elements. Memory for the first is taken whole, for small models too; CPUs: what caches hold."""
        reduce, gather = (2_000_000, 2_000_000) if device_type == "cpu" else (50_000_000, 500_000_000)
        return {
            "reduce_bucket_size": self.reduce_bucket_size or reduce,
            "allgather_bucket_size": self.allgather_bucket_size or gather,
        }


class DeepSpeedConfig(Block):
    """What is handed to DeepSpeed as it stands; all else in its dictionaries is derived from this file."""

    zero_optimization: ZeroConfig = Field(default_factory=lambda: ZeroConfig())
    wall_clock_breakdown: bool = False


class Config(Block):
    schema_file: str | None = Field(None, alias="$schema", description="for editors")
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="the run's folder is runs/NAME")
    seed: int = Field(0, ge=0, lt=2**64)
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
    sampling: SamplingConfig = Field(default_factory=lambda: SamplingConfig())
    evaluate: EvaluateConfig = Field(default_factory=lambda: EvaluateConfig())
    deepspeed: DeepSpeedConfig = Field(default_factory=lambda: DeepSpeedConfig())

    @model_validator(mode="after")
    def _possible(self) -> Self:
        patch = self.denoiser.patch
        cell = patch if self.latents is None else patch * self.latents.downsample
        if self.data.resolution % cell:
            allowed = f"the patch size {patch}"
            if self.latents is not None:
                allowed = f"{cell}, the patch size {patch} on {self.latents.downsample}x smaller latents"
            raise ValueError(f"data.resolution={self.data.resolution}: must be a multiple of {allowed}")
        if (self.data.source == "latents") != (self.latents is not None):
            raise ValueError(
                f"data.source={self.data.source}: "
                + ("needs a latents block" if self.latents is None else "the latents block is for data.source=latents")
            )
        if self.latents is not None and self.evaluate.every is not None:
            raise ValueError(
                "evaluate.every: the judges compare pixels; with data.source=latents it must be null"
                " (sample.py --folder writes images for other evaluators)"
            )
        try:
            find_sampler(self.sampling.sampler, self.process)
        except ValueError as error:
            raise ValueError(f"sampling.sampler={error}") from None
        if self.game.mode != "plain" and self.train.micro_batch < 2 and not self.game.queue:
            raise ValueError(
                "train.micro_batch=1: the game compares pairs, so it needs at least 2"
                " (or a game.queue, or game.mode=plain)"
            )
        samples = self.train.micro_batch * self.train.grad_accumulation
        if self.game.queue and self.game.mode == "plain":
            raise ValueError(f"game.queue={self.game.queue}: game.mode=plain compares nothing; it must be 0")
        if 0 < self.game.queue < samples:  # with several ranks engine.Players asks for more
            raise ValueError(f"game.queue={self.game.queue}: must be 0, or at least the {samples} samples of a step")
        if self.train.compile and self.implementation == "reference":
            raise ValueError("train.compile=true: implementation=reference is eager; use fast, or train.compile=false")
        zero = self.deepspeed.zero_optimization
        if zero.offload_param is not None and zero.stage != 3:
            raise ValueError(f"deepspeed.zero_optimization.offload_param: needs stage 3, not {zero.stage}")
        if zero.offload_optimizer is not None and zero.stage == 0:
            raise ValueError("deepspeed.zero_optimization.offload_optimizer: needs stage 1, 2 or 3, not 0")
        return self

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """[C, H, W] of what the denoiser sees: an image or a latent."""
        data, latents = self.data, self.latents
        if latents is None:
            return data.channels, data.resolution, data.resolution
        side = data.resolution // latents.downsample
        return latents.channels, side, side

    @property
    def process(self) -> Process:
        return self.diffusion.build()

    def resolved(self) -> dict[str, Any]:
        """Every field that has a say, with its value, for json.dumps; `check_config` makes the same Config of it."""
        tree = self.model_dump(mode="json", exclude={"schema_file"})
        return tree if self.denoiser.name is None else without(tree, (f"denoiser.{size}" for size in DENOISER_SIZES))

    def fingerprint(self) -> str:
        """sha256 over the fields that must stay the same when a run is resumed."""
        fixed = without(self.resolved(), CHANGEABLE)
        return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


# What a resumed run may have different: how long, how often, how parallel; not what is computed.
CHANGEABLE = (
    "name",
    "train.steps",
    "train.log_every",
    "train.sample_every",
    "train.checkpoint_every",
    "train.keep_last",
    "train.keep_every",
    "train.patience",
    "train.micro_batch",  # as long as all ranks together take as many samples a step, and compare as many
    "train.grad_accumulation",
    "deepspeed.zero_optimization",
    "train.compile",  # other roundings, and a way out where compilation fails
    "train.activation_checkpointing",
    "data.path",
    "data.threads",
    "data.prefetch",
    "data.loader",
    "data.decode",
    "data.broken",
    "latents.autoencoder",  # may have moved; that it is the same one is checked by its hash
    "latents.images",
    "latents.images_source",
    "latents.batch",
    "latents.shard_size",
    "sampling",
    "evaluate",
    "deepspeed.wall_clock_breakdown",
)


def without(tree: dict[str, Any], paths: Iterable[str]) -> dict[str, Any]:
    """A copy of nested dictionaries without the dotted `paths`; KeyError if one is not there."""
    result = {k: without(v, ()) if isinstance(v, dict) else v for k, v in tree.items()}
    for path in paths:
        *parents, last = path.split(".")
        node: Any = result
        for key in parents:
            node = node[key]
        if node is not None:  # a block that is not there
            node.pop(last)
    return result


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries to {"a.b.c": value}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read, override (`key.path=value`, value in JSON or a bare string) and check a configuration.

    Raises:
        UserError: one line with the key's path, its value and what is allowed.
    """
    try:
        raw = json.loads(Path(expand_home(path)).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"--config {path}: not valid JSON ({error})") from None
    if not isinstance(raw, dict):
        raise UserError(f"--config {path}: must hold one JSON object")
    refuse_deepspeed_format(path, raw)
    for text in overrides:
        override(raw, text)
    return check_config(raw)


def check_config(raw: dict[str, Any]) -> Config:
    """A Config from plain data; UserError as in `load_config`."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        problems = error.errors()
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(explain(problems[0], Config) + more) from None


def json_schema() -> dict[str, Any]:
    """JSON Schema of a configuration file, for editors."""
    return Config.model_json_schema(by_alias=True)
