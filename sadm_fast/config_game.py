"""The configuration's blocks about the structure encoder and the game."""

from typing import Literal, Self

from pydantic import Field, model_validator

from sadm_fast.config_block import MOST_STEPS, Block, FilePath, PsiTraining

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
