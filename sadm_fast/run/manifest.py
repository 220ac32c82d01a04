"""COMPLETE: the file that makes a folder of files a checkpoint. JSON: counters, identity, the hash of every file, and a
hash of itself, so that no value of it can change unnoticed.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sadm_fast.files import parse_json
from sadm_fast.run.state import TrainState

MANIFEST = "COMPLETE"
FORMAT = 2
EMA_FILE = "ema.safetensors"
MORE_EMA = "ema-"  # further averages: ema-power-0.05.safetensors
QUEUE_FILE = "queue.safetensors"

_RANKS_AT_MOST = 2**20

Count = Annotated[int, Field(ge=0)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Damaged(Exception):
    """A checkpoint is damaged; the message is a clause that says how."""


class OtherFormat(Exception):
    """A checkpoint has a format that this code does not read; the message is its number."""


class Manifest(BaseModel):
    """The content of COMPLETE. What a run does not have (a discriminator, latents, a queue) is absent."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    format: int = Field(FORMAT, ge=FORMAT, le=FORMAT)
    step: Count
    # The identity: what a run must agree with to go on from here.
    configuration: str | None = Field(None, description="Config.fingerprint")
    data: str | None = Field(None, description="Source.fingerprint")
    latent_space: dict[str, Any] | None = None
    starting_weights: Digest | None = Field(None, description="of the file, where only a part of them is trained")
    networks: Digest | None = Field(None, description="of the weights' names and shapes, if the caller gave a network")
    samples_per_step: int | None = Field(None, ge=1, description="over all ranks")
    samples_compared: int | None = Field(None, ge=1, description="that S looks at together")
    world_size: int = Field(ge=1, le=_RANKS_AT_MOST, description="ranks that wrote it")
    state: TrainState
    optimizer_steps: dict[str, Count] = Field(description="by player")
    files: dict[str, Digest] = Field(min_length=1, description="hash by name, relative to the folder")
    sha256: Digest | None = Field(None, description="of all of the above; the first versions wrote none")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        state = self.state
        if self.step != state.step:
            raise ValueError(f"step={self.step} is not state.step={state.step}")
        if self.samples_per_step is not None and state.samples_seen != state.step * self.samples_per_step:
            raise ValueError(
                f"state.samples_seen={state.samples_seen} is not step={state.step} x samples_per_step="
                f"{self.samples_per_step}"
            )
        for player, steps in self.optimizer_steps.items():
            if steps > state.ema_updates or (player == "denoiser" and steps != state.ema_updates):
                raise ValueError(f"optimizer_steps.{player}={steps} does not fit ema_updates={state.ema_updates}")
        parts = len(self.optimizer_steps) * self.world_size
        names = {name for name in self.files if name != QUEUE_FILE and not name.startswith(MORE_EMA)}
        if len(names) != parts + 1 or names != {EMA_FILE, *self._parts()}:
            raise ValueError(f"files are not those of {self.world_size} rank(s) with {sorted(self.optimizer_steps)}")
        return self

    def _parts(self) -> list[str]:
        return [part for player in self.optimizer_steps for part in self.parts_of(player)]

    def parts_of(self, player: str) -> list[str]:
        """The names of a player's files, one a rank."""
        return [part_name(player, rank) for rank in range(self.world_size)]

    def to_json(self) -> dict[str, Any]:
        """The content of the file."""
        value = self.model_dump(exclude_none=True)
        return {**value, "sha256": _digest(value)}

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The manifest in a checkpoint's folder.

        Raises:
            OtherFormat: it is sound, as far as it says, and of another format.
            Damaged: it cannot be read or contradicts itself.
        """
        try:
            value = parse_json((folder / MANIFEST).read_text(encoding="utf-8"))
            if not isinstance(value, dict):
                raise ValueError("it is no JSON object")
            if "sha256" in value and _digest(value) != value["sha256"]:
                raise ValueError("it does not match its own hash")
        except (OSError, ValueError) as error:
            raise Damaged(f"{MANIFEST} cannot be read ({_short(str(error))})") from None
        if isinstance(value.get("format"), int) and value["format"] != FORMAT:
            raise OtherFormat(value["format"])
        try:
            found = cls.model_validate(value)
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"]))
            given = "" if isinstance(problem["input"], dict) else f"={_short(json.dumps(problem['input']))}"
            said = f"{where}{given}: {problem['msg'].removeprefix('Value error, ')}".removeprefix(": ")
            raise Damaged(f"{MANIFEST} cannot be right ({said})") from None
        if missing := sorted(TrainState.model_fields.keys() - found.state.model_fields_set):
            raise Damaged(f"{MANIFEST} cannot be right (state.{missing[0]} is missing)")
        if folder.name.removesuffix(".tmp") != folder_name(found.step):
            raise Damaged(f"{MANIFEST} is of step {found.step}")
        return found


def folder_name(step: int) -> str:
    """The name of a step's checkpoint folder, and the beginning of the names of its pictures and relations."""
    return f"step-{step:06d}"


def step_of(folder: Path) -> int | None:
    """The step in the name of a checkpoint folder; None if it is not such a name."""
    match = re.fullmatch(r"step-([0-9]{6,18})", folder.name)
    return int(match[1]) if match and folder_name(int(match[1])) == folder.name else None


def completed(checkpoints: Path) -> list[Path]:
    """Checkpoint folders that were written to the end, oldest first; other names are somebody else's."""
    steps = {path.parent: step_of(path.parent) for path in checkpoints.glob(f"*/{MANIFEST}")}
    return [folder for _, folder in sorted((step, folder) for folder, step in steps.items() if step is not None)]


def part_name(player: str, rank: int) -> str:
    """The file that a rank writes for a player."""
    return f"{player}/rank-{rank}.safetensors"


def _digest(value: dict[str, Any]) -> str:
    """sha256 over a manifest's values but its hash, however the file spells them."""
    rest = {key: item for key, item in value.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _short(text: str) -> str:
    return " ".join(text.split())[:200]
