"""The configuration's blocks about drawing samples and scoring them."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PlainSerializer, PlainValidator, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from sadm_fast.config_block import MOST_STEPS, Block, ClassifierTraining
from sadm_fast.diffusion.process import Steps
from sadm_fast.diffusion.samplers import SAMPLERS, options_of

_MOST_SAMPLER_STEPS = 10**5


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
    """Frechet distances between samples and real images, during the run and as evaluate.py's defaults."""

    every: int | None = Field(None, ge=1, le=MOST_STEPS, description="steps between evaluations; null: never")
    samples: int = Field(2000, ge=2, le=10**8, description="samples drawn for each line of scores")
    batch: int = Field(250, ge=1, le=2**20, description="samples that a rank draws at a time")
    steps: int = Field(12, ge=1, le=10**5, description="sampler steps")
    guidance: tuple[Annotated[float, Field(ge=0, le=1e4)], ...] = Field(
        (1.0,), min_length=1, max_length=16, strict=False, description="guidance scales, each scored; 1: none"
    )
    ema: tuple[Annotated[float, Field(ge=1e-3, lt=0.28)] | Annotated[str, Field(min_length=1)], ...] | None = Field(
        None,
        min_length=1,
        max_length=16,
        strict=False,
        description="averages, each scored: widths of power-function ones, or names (exponential-0.9999), of train.ema"
        " and train.more_ema; null: train.ema alone",
    )
    judges: tuple[Annotated[str, Field(min_length=1)], ...] | None = Field(
        None,
        min_length=1,
        max_length=16,
        strict=False,
        description="feature spaces: classifier, random, pixels, and judges with weights, NAME or NAME=FILE as"
        " evaluate.py --judges; null: classifier, random and pixels, of latents random and pixels",
    )
    real_images: int = Field(10000, ge=4, le=10**8, description="most real images to compare with")
    judge: ClassifierTraining = Field(
        default_factory=lambda: ClassifierTraining(), description="training of the classifier behind fid_classifier"
    )

    @model_validator(mode="after")
    def _once(self) -> Self:
        for name, values in (("guidance", self.guidance), ("ema", self.ema), ("judges", self.judges)):
            found = [value.partition("=")[0] if name == "judges" else value for value in map(_plain, values or ())]
            if twice := [value for value in found if found.count(value) > 1]:
                raise ValueError(f"{name}: {twice[0]} is there twice; its scores would have one name")
        return self


def _plain(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"
