"""The configuration's blocks about the noise process and the denoiser."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from sadm_fast.config_block import Block, FilePath
from sadm_fast.diffusion import EDM, VP, Flow, Process
from sadm_fast.models.dit import parse_name
from sadm_fast.models.unet import level_sides, norm_groups


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


_SIZES = ("patch_size", "hidden_size", "depth", "num_heads")  # given in numbers or by a name
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
            given = [size for size in _SIZES if size in self.model_fields_set]
            if given:
                raise ValueError(f"name={self.name!r} fixes {', '.join(given)}: give one or the other")
        elif self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise ValueError(
                f"hidden_size={self.hidden_size}: must be a multiple of 4 and of num_heads={self.num_heads}"
            )
        return self

    @property
    def idle(self) -> set[str]:
        """Fields that have no say: of other architectures, and sizes beside a name."""
        of_others = {f for other, fields in _OWN_FIELDS.items() if other != self.architecture for f in fields}
        sizes = _SIZES if self.name is not None else ("depth",) if self.architecture == "own" else ()
        return {*of_others, *sizes}

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
