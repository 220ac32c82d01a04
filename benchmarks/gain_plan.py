"""A plan of benchmarks/game_gain.py: which configurations are trained on which sets with which seeds, and when scored.

    {
      "expectation": "what is expected, written before the series",
      "sets": {"digits": {"config": "configs/mnist.json", "set": {}}},
      "configurations": {"plain": {"game.mode": "plain"}, "game": {"game.mode": "sadm"}},
      "seeds": [0, 1],
      "score_at": [500, 1000],
      "set": {"train.micro_batch": 64},
      "judges": ["efficientnet_lite0"]
    }

`set` changes fields of the configuration file, by their dotted names; what a set says yields to the plan's own `set`,
and that to a configuration's. The first configuration is the one that the others are compared with.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import gcd
from pathlib import Path
from typing import Any, Self

from sadm_fast.config import Config, load_config
from sadm_fast.config_tree import flatten, without
from sadm_fast.errors import UserError
from sadm_fast.files import parse_json
from sadm_fast.metrics.pretrained import PRETRAINED

ROOT = Path(__file__).resolve().parent.parent
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_REQUIRED = {"expectation": str, "sets": dict, "configurations": dict, "seeds": list, "score_at": list}
_OPTIONAL = {"set": dict, "judges": list}
# What a configuration may differ in: data, noise, sampling and judges are the same for all that are compared.
_VARIED = ("game.", "structure_encoder.", "denoiser.", "denoiser_optimizer.", "discriminator_optimizer.", "train.")
# Fields that came after the first series, with their default: where they have it, finished runs still count.
_YOUNGER: dict[str, Any] = {
    "data.held_out": 0.0,
    "denoiser.label_map": None,
    "denoiser.train": "all",
    "evaluate.ema": None,
    "evaluate.guidance": [1.0],
    "evaluate.judges": None,
    "structure_encoder.pretrain.labels": "own",
}


@dataclass(frozen=True)
class Job:
    """One training of a plan."""

    set: str
    configuration: str
    seed: int


@dataclass(frozen=True)
class Plan:
    """A plan that was checked; the fields are those of the file."""

    name: str
    expectation: str
    sets: Mapping[str, Mapping[str, Any]]
    configurations: Mapping[str, Mapping[str, Any]]
    seeds: tuple[int, ...]
    score_at: tuple[int, ...]
    set: Mapping[str, Any]
    judges: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read and check a plan. Raises UserError: what is wrong, and what would be right."""
        try:
            raw = parse_json(path.read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read as JSON ({error})") from None
        if not isinstance(raw, dict):
            raise UserError(f"{path}: must hold one JSON object")
        for key in _REQUIRED:
            if not raw.get(key):
                raise UserError(f"{path}: {key}: is missing or empty")
        for key, value in raw.items():
            kind = {**_REQUIRED, **_OPTIONAL}.get(key)
            if kind is None:
                raise UserError(f"{path}: {key}: must be one of {', '.join([*_REQUIRED, *_OPTIONAL])}")
            if not isinstance(value, kind):
                raise UserError(f"{path}: {key}: must be a {kind.__name__}")
        for name in (*raw["sets"], *raw["configurations"]):
            if not _NAME.fullmatch(name):
                raise UserError(f"{path}: {name!r}: a name is letters, digits, dots, dashes and underscores")
        for name, one in raw["sets"].items():
            if not isinstance(one, dict) or not {"config"} <= one.keys() <= {"config", "set"}:
                raise UserError(f'{path}: sets.{name}: must be {{"config": FILE, "set": {{...}}}}')
        for name, changes in raw["configurations"].items():
            if not isinstance(changes, dict):
                raise UserError(f"{path}: configurations.{name}: must be an object of fields")
            for field in changes:
                if not field.startswith(_VARIED):
                    raise UserError(
                        f"{path}: configurations.{name}: {field} must be the same for all; give it in `set` (free are"
                        f" {', '.join(f'{prefix}*' for prefix in _VARIED)})"
                    )
        for key in ("seeds", "score_at"):
            numbers, least = raw[key], key == "score_at"
            if not all(type(n) is int and n >= least for n in numbers) or len(set(numbers)) < len(numbers):
                raise UserError(f"{path}: {key}={numbers}: must be different whole numbers")
        for name in raw.get("judges", []):
            if name not in PRETRAINED:
                raise UserError(f"{path}: judges: {name} must be one of {', '.join(PRETRAINED)}")
        plan = cls(
            path.stem,
            raw["expectation"],
            raw["sets"],
            raw["configurations"],
            tuple(raw["seeds"]),
            tuple(sorted(raw["score_at"])),
            raw.get("set", {}),
            tuple(raw.get("judges", [])),
        )
        for job in plan.jobs:
            if (psi := plan.config(job).structure_encoder.architecture) in plan.judges:
                raise UserError(f"{path}: judges: {psi} is the Psi of {job.configuration}; take another of its kind")
        return plan

    @property
    def jobs(self) -> list[Job]:
        """All trainings, seed by seed: a series that is cut short has the same seeds of every set."""
        return [Job(s, c, seed) for seed in self.seeds for s in self.sets for c in self.configurations]

    @property
    def baseline(self) -> str:
        return next(iter(self.configurations))

    def against(self, name: str) -> Self:
        """The plan with another baseline; UserError if it has no such configuration."""
        if name not in self.configurations:
            raise UserError(f"{self.name}: {name} must be one of {', '.join(self.configurations)}")
        return replace(self, configurations={name: self.configurations[name], **self.configurations})

    def changes(self, job: Job) -> dict[str, Any]:
        """What `--set` changes for a job."""
        every = gcd(*self.score_at)
        return {
            **self.sets[job.set].get("set", {}),
            **self.set,
            **self.configurations[job.configuration],
            "name": f"{job.set}-{job.configuration}-{job.seed}",
            "seed": job.seed,
            "train.steps": self.score_at[-1],
            "train.checkpoint_every": every,
            "train.keep_every": every,
            "train.sample_every": self.score_at[-1],
            "evaluate.every": None,  # scored afterwards, by more judges
            "logging": [],
        }

    def config_file(self, job: Job) -> Path:
        return ROOT / self.sets[job.set]["config"]

    def config(self, job: Job) -> Config:
        """The configuration of a job, without the weights of Psi; UserError as load_config, with the job's name."""
        try:
            return load_config(self.config_file(job), overrides(self.changes(job)))
        except UserError as error:
            raise UserError(f"{self.name}: {job.set}, {job.configuration}: {error}") from None

    def digest(self, job: Job) -> str:
        """16 hex digits over all that a job's result depends on but code and machine."""
        config = self.config(job).resolved()
        known = without(config, [field for field, value in _YOUNGER.items() if flatten(config)[field] == value])
        tree = {"config": known, "score_at": self.score_at, "judges": self.judges}
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]

    @cached_property
    def digests(self) -> dict[Job, str]:
        return {job: self.digest(job) for job in self.jobs}


def overrides(changes: Mapping[str, Any]) -> list[str]:
    """`changes` as arguments of --set."""
    return [f"{field}={json.dumps(value)}" for field, value in changes.items()]
