"""A run's configuration: one strict JSON file, each field with its meaning, default and range.

The blocks about optimizers, averages, the loop and DeepSpeed are in config_training.py, those about drawing and scoring
samples in config_sampling.py. Upper limits lie beyond what any machine holds: a larger number is a typing mistake.
`_size_problem` limits products.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from sadm_fast.config_block import MOST_STEPS, Block, FilePath, PsiTraining
from sadm_fast.config_errors import explain, refuse_deepspeed_format
from sadm_fast.config_sampling import EvaluateConfig, SamplingConfig
from sadm_fast.config_training import DeepSpeedConfig, EMAProfile, OptimizerConfig, TrainConfig
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
from sadm_fast.diffusion.samplers import SAMPLERS, options_of, sampler_name
from sadm_fast.errors import UserError
from sadm_fast.game import Comparison
from sadm_fast.models.dit import parse_name
from sadm_fast.models.unet import level_sides, norm_groups

_MOST_TOKENS = 2**20  # of one image
_MOST_BYTES = 2**40  # of one layer's output, in fp32


class DataConfig(Block):
    path: FilePath = Field("demo:mnist5k", description="folder of the samples; demo:mnist5k is the embedded demo set")
    source: Literal["folder", "webdataset", "mds", "huggingface", "latents", "own"] = Field(
        "folder",
        description="folder: class/name.png; webdataset: tar shards; mds: MosaicML's shards; huggingface: Parquet or"
        " Arrow files; latents: what encode.py wrote; own: given to sadm_fast.train",
    )
    resolution: int = Field(
        16, ge=8, le=2**14, description="side of the square crop in pixels, also of the images behind latents"
    )
    channels: Literal[1, 3] = Field(1, description="1 grey, 3 colour")
    held_out: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of each class that nothing is trained on; evaluate.py --memorisation compares with it",
    )
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

    autoencoder: FilePath | None = Field(
        "stabilityai/sd-vae-ft-ema",
        description="diffusers AutoencoderKL: a local folder or a hub id; null: samples stay latents, without pictures",
    )
    channels: int = Field(4, ge=1, le=1024, description="channels of a latent")
    downsample: int = Field(8, ge=1, le=1024, description="side of an image over the side of its latent")
    scale: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="scaled latent = scale * raw latent; null: the autoencoder's scaling_factor, or by the channels of"
        " latents_stats.pt",
    )
    images: FilePath | None = Field(None, description="encode.py: folder of the images to encode")
    images_source: Literal["folder", "webdataset", "mds", "huggingface"] = Field(
        "folder", description="encode.py: as data.source"
    )
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
# What has a say in one architecture only.
_OWN_FIELDS = {
    "dit": ("name", "patch_size", "hidden_size", "num_heads", "train", "label_map", "position_grid"),
    "unet": ("channels", "channel_multipliers", "attention_resolutions", "dropout", "augment", "conditional"),
}


class DenoiserConfig(Block):
    architecture: Literal["dit", "unet", "own"] = Field(
        "dit",
        description="dit: a diffusion transformer; unet: EDM's DDPM++, of diffusers' parts; own: given to"
        " sadm_fast.train",
    )
    name: str | None = Field(None, description='a published size, "DiT-S/4" .. "DiT-XL/2"; null: the four sizes below')
    patch_size: int = Field(4, ge=1, le=1024, description="side of the square that becomes one token")
    hidden_size: int = Field(128, ge=8, le=2**16, description="width of a token")
    depth: int = Field(4, ge=1, le=256, description="transformer blocks; unet: residual blocks of a level")
    num_heads: int = Field(4, ge=1, le=2**14, description="attention heads of a block")
    channels: int = Field(128, ge=4, le=2**13, description="unet: channels of a level with multiplier 1")
    channel_multipliers: tuple[Annotated[int, Field(ge=1, le=64)], ...] = Field(
        (2, 2, 2),
        strict=False,
        min_length=1,
        max_length=12,
        description="unet: for each level; the next one is half as wide and high",
    )
    attention_resolutions: tuple[Annotated[int, Field(ge=1, le=2**14)], ...] = Field(
        (16,), strict=False, max_length=12, description="unet: sides of the levels whose blocks attend"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="unet: of its residual blocks, drawn from counters")
    augment: float = Field(
        0.0,
        ge=0,
        le=1,
        description="unet: probability of each of EDM's geometric augmentations, of which the network is told, so that"
        " samples show none; the images are mirrored too; pixels only",
    )
    conditional: bool = Field(True, description="unet: false: the network is told no labels, and has no null class")
    num_classes: int | None = Field(None, ge=1, le=2**24, description="null: the number of classes in the data")
    label_dropout: float = Field(0.1, ge=0, lt=1, description="share of labels replaced by the null class")
    train: Literal["all", "difffit"] = Field(
        "all",
        description="what of the network is trained; difffit: biases, the label table and inserted scale factors, all"
        " else stays as in `weights`, and checkpoints hold only what is trained",
    )
    weights: FilePath | None = Field(
        None,
        description="what to start from, for fine-tuning: safetensors or .pt with DiT's names, as DiT and SiT publish"
        " them, or a run's folder; the label table starts anew if it is for another number of classes, and a learned"
        " variance that is not asked for is left out",
    )
    weights_entry: Literal["ema", "model"] = Field(
        "ema", description="what to take of a train.py's .pt: the averaged weights, or those of its last step"
    )
    label_map: FilePath | None = Field(
        None,
        description="which row of the weights' label table a class starts from; names: that of its name, among the"
        " classes of a run or a pipeline; or a JSON file {class here: its number there}; the others start anew",
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
        for architecture, fields in _OWN_FIELDS.items():
            given = [field for field in fields if field in self.model_fields_set]
            if given and self.architecture not in (architecture, "own"):
                raise ValueError(f"{given[0]}: is for architecture={architecture}, here it is {self.architecture}")
        for field in ("train", "label_map"):
            if getattr(self, field) not in ("all", None) and self.weights is None:
                raise ValueError(f"{field}={getattr(self, field)}: is for fine-tuning; needs weights")
        if self.architecture == "unet":
            norm_groups(self.channels)
            if not self.conditional and self.label_dropout:
                raise ValueError(
                    f"label_dropout={self.label_dropout:g}: conditional=false has no labels to drop; it must be 0"
                )
        elif self.name is not None:
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
        """Side of a token's square of a DiT, of the named or the given size."""
        return self.patch_size if self.name is None else parse_name(self.name)[3]

    @property
    def cell(self) -> int:
        """What the side of a sample must be a multiple of."""
        return 2 ** (len(self.channel_multipliers) - 1) if self.architecture == "unet" else self.patch

    @property
    def cell_name(self) -> str:
        """`cell` in words."""
        if self.architecture == "unet":
            return f"{self.cell} for the {len(self.channel_multipliers)} levels of denoiser.channel_multipliers"
        return f"the patch size {self.patch}"

    def widest(self, side: int) -> int:
        """Elements of the largest activation of a sample of this side."""
        if self.architecture == "unet":
            sides = level_sides(side, len(self.channel_multipliers))
            widths = zip(self.channel_multipliers, sides, strict=True)
            return max(2 * self.channels * multiplier * at**2 for multiplier, at in widths)  # two, side by side
        width = self.hidden_size if self.name is None else parse_name(self.name)[1]
        return 4 * width * self.tokens(side)  # of the MLP

    def tokens(self, side: int) -> int:
        """The most tokens that attend to each other in a sample of this side."""
        if self.architecture == "unet":
            return max(self.attention_resolutions, default=0) ** 2
        return (side // self.patch) ** 2


EFFICIENTNETS = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")


class StructureEncoderConfig(Block):
    """Psi, which maps an image (or latent) to one feature row."""

    architecture: Literal[
        "cnn", "resnet18", "vit", "efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2", "own"
    ] = Field(
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
        64, ge=1, le=2**16, description="cnn: length of a feature row (resnet18: 512, vit: width, efficientnet: 1280)"
    )
    stem: Literal["imagenet", "small"] = Field("imagenet", description="resnet18: small for images up to 64 pixels")
    norm: Literal["group", "frozen"] = Field(
        "group", description="resnet18: group norm, or batch norm with frozen statistics (for torchvision's weights)"
    )
    depth: int = Field(12, ge=1, le=256, description="vit: blocks")
    patch_size: int = Field(14, ge=1, le=1024, description="vit: side of a patch")
    input_size: int = Field(
        224,
        ge=1,
        le=2**14,
        description="vit, efficientnet: side that images are resized to; vit: a multiple of patch_size",
    )
    position_grid: int = Field(
        37, ge=1, le=1024, description="vit: side of the weights' table of positions in patches (DINOv2: 37)"
    )
    registers: int = Field(0, ge=0, le=1024, description="vit: register tokens of the weights")
    weights: FilePath | None = Field(
        None,
        description="what to start from, safetensors or .pt; a classifier in it is left out; installed: what the"
        " package of an efficientnet ships; null: train on the data first",
    )
    pretrain: PsiTraining = Field(
        default_factory=lambda: PsiTraining(), description="Psi's training as a classifier, before the game"
    )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.architecture == "vit" and self.input_size % self.patch_size:
            raise ValueError(f"input_size={self.input_size}: must be a multiple of patch_size={self.patch_size}")
        if self.weights == "installed" and self.architecture not in EFFICIENTNETS:
            raise ValueError(f"weights=installed: no package has those of {self.architecture}; use {EFFICIENTNETS[0]}")
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
    start_step: int = Field(0, ge=0, le=MOST_STEPS, description="steps of plain training before the game starts")
    warmup_steps: int = Field(
        0,
        ge=0,
        le=MOST_STEPS,
        description="first steps of the game, in which the discriminator learns alone: lambda_s and the denoiser's"
        " learning rate are 0",
    )
    ramp_steps: int = Field(0, ge=0, le=MOST_STEPS, description="steps over which lambda_s then grows linearly from 0")
    decay_steps: int = Field(
        0,
        ge=0,
        le=MOST_STEPS,
        description="last steps of the game, over which lambda_s falls linearly to 0",
    )
    stop_step: int | None = Field(
        None, ge=1, le=MOST_STEPS, description="from this step on the training is plain again; null: never"
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
    look_at: Literal["estimate", "hidden"] = Field(
        "estimate",
        description="whose relations are matched with those of Psi's features of x0; estimate: Psi's features of xhat0;"
        " hidden: the denoiser's own tokens after `block`, so that S does not bend xhat0 itself (mode=structure)",
    )
    block: int = Field(1, ge=1, le=256, description="look_at=hidden: after which of the denoiser's blocks")
    stage: int = Field(
        2,
        ge=1,
        le=256,
        description="tokens and locations: the stage of Psi whose maps are compared, from the image on (cnn: 3 stages,"
        " resnet18: 4, vit: its blocks, efficientnet: 7); maps larger than 8x8 are averaged down to that",
    )
    strength: Literal["weight", "gradient", "per_sample"] = Field(
        "weight",
        description="what lambda_s is; weight: of S; gradient: the gradient of S in xhat0 gets lambda_s times"
        " the length of that of the denoising loss, in each micro-batch; per_sample: in each sample, times its gate",
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
        maps, hidden = self.compares_maps, self.look_at == "hidden"
        wrong = [
            (hidden and self.mode == "sadm", "look_at=hidden: Psi cannot play against the tokens; use mode=structure"),
            (hidden and self.strength != "weight", "look_at=hidden: needs strength=weight"),
            (hidden and self.compare == "features", "look_at=hidden: tokens have no features of Psi to equal"),
            (hidden and self.queue, "look_at=hidden: needs queue=0"),
            (hidden and self.scope == "global", "look_at=hidden: needs scope=rank"),
            (not hidden and self.block != 1, f"block={self.block}: is for look_at=hidden"),
            (self.strength != "weight" and self.scope == "global", f"strength={self.strength}: needs scope=rank"),
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

    @property
    def compares_maps(self) -> bool:
        """Whether S compares feature maps of `stage`, not pooled features."""
        return self.compare in ("tokens", "locations")

    def playing(self, step: int) -> bool:
        """Whether 0-based iteration `step` belongs to the game; before and after it the training is plain."""
        return self.mode != "plain" and self.start_step <= step and (self.stop_step is None or step < self.stop_step)


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
        if self.structure_encoder.input == "pixels" and not self.paints:
            raise ValueError("structure_encoder.input=pixels: decodes latents; latents.autoencoder is null")
        if self.evaluate.every is not None and self.data.shape is None and not self.paints:
            raise ValueError(
                f"evaluate.every={self.evaluate.every}: the judges compare images; latents.autoencoder is null"
            )
        if self.data.shape is not None and self.evaluate.every is not None:
            raise ValueError(
                f"evaluate.every={self.evaluate.every}: the judges compare images; with data.shape it must be null"
                " (sadm_fast.load draws samples for a judge of your own)"
            )
        if (problem := _sampling_problem(self) or _evaluation_problem(self)) is not None:
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
        if psi.architecture in EFFICIENTNETS and (len(self.psi_shape) != 3 or self.psi_shape[0] not in (1, 3)):
            raise ValueError(
                f"structure_encoder.architecture={psi.architecture}: takes images of 1 or 3 channels, not samples of"
                f" {list(self.psi_shape)}"
            )
        stages = {"cnn": 3, "resnet18": 4, "vit": psi.depth, **dict.fromkeys(EFFICIENTNETS, 7)}.get(psi.architecture)
        if self.game.compares_maps and stages is not None and self.game.stage > stages:
            raise ValueError(f"game.stage={self.game.stage}: {psi.architecture} has {stages}")
        if self.game.look_at == "hidden" and (problem := _hidden_problem(self)) is not None:
            raise ValueError(f"game.look_at=hidden: {problem}")
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
    def paints(self) -> bool:
        """Whether samples are pictures, or latents that can be decoded to some."""
        return self.data.shape is None and (self.latents is None or self.latents.autoencoder is not None)

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

    @property
    def comparison(self) -> Comparison:
        """S over the samples of one rank."""
        game = self.game
        return Comparison(
            relation=game.relation,
            penalty=game.penalty,
            normalize=game.normalize,
            tau=game.tau,
            delta=game.delta,
            gate_log_snr=game.gate_log_snr,
            gate_slope=game.gate_slope,
            same_class=game.same_class,
            compare=game.compare,
            one_level=game.noise_levels == "batch",
            impl="reference" if self.implementation == "reference" else "auto",
        )

    @property
    def judges(self) -> tuple[str, ...]:
        """Names of the judges of evaluate.judges, those with a file as NAME=FILE."""
        own = ("classifier", "random", "pixels") if self.latents is None else ("random", "pixels")
        return own if self.evaluate.judges is None else self.evaluate.judges

    @property
    def scored_averages(self) -> list[EMAProfile]:
        """Profiles of the averages of evaluate.ema."""
        which = [self.train.ema.label] if self.evaluate.ema is None else self.evaluate.ema
        return [profile for profile in map(self.train.profile, which) if profile is not None]

    def resolved(self) -> dict[str, Any]:
        """Every field that has a say, with its value, for json.dumps; `check_config` makes the same Config of it."""
        tree = self.model_dump(mode="json", exclude={"schema_file"})
        denoiser = self.denoiser
        idle = {field for other, fields in _OWN_FIELDS.items() if other != denoiser.architecture for field in fields}
        if denoiser.name is not None:
            idle.update(DENOISER_SIZES)
        if denoiser.architecture == "own":
            idle.add("depth")
        return without(tree, (f"denoiser.{field}" for field in idle))

    def fingerprint(self) -> str:
        """sha256 over the fields that must stay the same when a run is resumed."""
        # DiffFit needs its starting weights again, wherever they are by then; they are known by their hash.
        moved = ("denoiser.weights",) if self.denoiser.train == "difffit" else ()
        return _digest(without_later(without(self.resolved(), (*CHANGEABLE, *moved))))

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
    if sampling.guidance_scale != 1.0 and not config.denoiser.conditional:
        return (
            f"sampling.guidance_scale={sampling.guidance_scale:g}: denoiser.conditional=false has no null class to"
            " guide from; it must be 1"
        )
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


def _evaluation_problem(config: Config) -> str | None:
    """Say what evaluations cannot do; None if nothing is wrong."""
    evaluate, train = config.evaluate, config.train
    for which in evaluate.ema or ():
        if train.profile(which) is None:
            kept = ", ".join(profile.label for profile in train.profiles)
            return f"evaluate.ema={which}: the run keeps {kept}; add it to train.more_ema"
    guided = [scale for scale in evaluate.guidance if scale != 1.0]
    if guided and not config.denoiser.conditional:
        return (
            f"evaluate.guidance={guided[0]:g}: denoiser.conditional=false has no null class to guide from; it must be 1"
        )
    if config.latents is not None and "classifier" in config.judges:
        return "evaluate.judges=classifier: is trained on images; with data.source=latents use others"
    return None


def _shape_problem(config: Config) -> str | None:
    """Say why samples of this shape cannot go through the chosen networks; None if they can."""
    data, latents, denoiser = config.data, config.latents, config.denoiser
    if denoiser.augment and latents is not None:
        return f"denoiser.augment={denoiser.augment:g}: moves pixels; with data.source=latents it must be 0"
    if data.shape is not None:
        if data.source != "own":
            return f"data.shape={list(data.shape)}: is for data.source=own"
        square = len(data.shape) == 3 and data.shape[1] == data.shape[2]
        if denoiser.architecture != "own" and not (square and data.shape[1] % denoiser.cell == 0):
            return (
                f"data.shape={list(data.shape)}: denoiser.architecture={denoiser.architecture} takes [C, S, S], S a"
                f" multiple of {denoiser.cell_name}; give sadm_fast.train a denoiser of your own"
            )
        if config.game.mode != "plain" and config.structure_encoder.architecture != "own" and len(data.shape) != 3:
            return (
                f"data.shape={list(data.shape)}: structure_encoder.architecture={config.structure_encoder.architecture}"
                " takes [C, H, W]; give sadm_fast.train an encoder of your own"
            )
    elif denoiser.architecture != "own":
        down = 1 if latents is None else latents.downsample
        if data.resolution % (denoiser.cell * down):
            allowed = denoiser.cell_name
            if latents is not None:
                allowed = f"{denoiser.cell * down}, {allowed} on {down}x smaller latents"
            return f"data.resolution={data.resolution}: must be a multiple of {allowed}"
    if denoiser.architecture == "unet":
        sides = level_sides(config.sample_shape[1], len(denoiser.channel_multipliers))
        attention = list(denoiser.attention_resolutions)
        if not set(attention) <= set(sides):
            return f"denoiser.attention_resolutions={attention}: must be sides of levels, which here are {sides}"
    return None


def _hidden_problem(config: "Config") -> str | None:
    """Say why S cannot look at the denoiser's tokens; None if it can."""
    denoiser, block = config.denoiser, config.game.block
    if denoiser.architecture != "dit":
        return f"needs denoiser.architecture=dit, not {denoiser.architecture}"
    depth = denoiser.depth if denoiser.name is None else parse_name(denoiser.name)[0]
    if block > depth:
        return f"game.block={block}: the denoiser has {depth}"
    if config.train.compile != "off" or config.train.activation_checkpointing:
        return "needs train.compile=off and train.activation_checkpointing=false"
    return None


def _size_problem(config: Config) -> str | None:
    """Say which number makes one layer's output larger than any machine holds; None if none does."""
    shape, psi, sampling = config.sample_shape, config.structure_encoder, config.sampling
    denoise = encode = math.prod(shape)  # nothing more is known of a network that the caller gives
    if config.denoiser.architecture != "own":
        tokens = config.denoiser.tokens(shape[1])
        if tokens > _MOST_TOKENS:
            return (
                f"data.resolution={config.data.resolution}: is {tokens:,} tokens; at most {_MOST_TOKENS:,} (a larger"
                " patch, attention on smaller levels only, or a lower resolution)"
            )
        denoise = config.denoiser.widest(shape[1])
    if psi.architecture == "vit":
        encode = max(3 * psi.input_size**2, 4 * psi.width * (psi.input_size // psi.patch_size) ** 2)
    elif psi.architecture in EFFICIENTNETS:
        encode = 24 * psi.input_size**2  # 6 x 16 channels at half the side
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
