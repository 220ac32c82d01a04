"""A run's configuration: one strict JSON file, each field with its meaning, default and range.

The blocks are in files of their own: config_data.py, config_denoiser.py (with the noise process), config_game.py (with
the structure encoder), config_training.py (optimizers, averages, the loop, DeepSpeed), config_sampling.py (drawing and
scoring samples). Here they come together, with the checks that concern several of them. Upper limits lie beyond what
any machine holds: a larger number is a typing mistake. `_size_problem` limits products.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from sadm_fast.config_block import Block
from sadm_fast.config_data import DataConfig, LatentsConfig
from sadm_fast.config_denoiser import DenoiserConfig, EDMConfig, FlowConfig, VPConfig
from sadm_fast.config_errors import explain, refuse_deepspeed_format
from sadm_fast.config_game import EFFICIENTNETS, GameConfig, StructureEncoderConfig
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
from sadm_fast.diffusion import EDM, VP, Process
from sadm_fast.diffusion.samplers import SAMPLERS, options_of, sampler_name
from sadm_fast.errors import UserError
from sadm_fast.game import Comparison
from sadm_fast.models.dit import parse_name
from sadm_fast.models.unet import level_sides

_MOST_TOKENS = 2**20  # of one image
_MOST_BYTES = 2**40  # of one layer's output, in fp32


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
        return without(tree, (f"denoiser.{field}" for field in self.denoiser.idle))

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
