"""The counters of a run, as its checkpoints keep them."""

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

_MOST = 2**62  # samples are numbered in int64


class TrainState(BaseModel):
    """Where a run is: the one thing besides tensors that a step changes."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    step: int = Field(0, ge=0, le=_MOST, description="iterations, taken or skipped")
    samples_seen: int = Field(0, ge=0, le=_MOST, description="of all ranks; the position in the order of the data")
    skipped_steps: int = Field(0, ge=0, le=_MOST, description="iterations whose loss or gradient was not finite")
    ema_updates: int = Field(0, ge=0, le=_MOST, description="iterations that changed the weights, and so the average")
    seconds: float = Field(0.0, ge=0, description="in the loop, over all stops of the run")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.step != self.ema_updates + self.skipped_steps:
            raise ValueError(
                f"step={self.step} is not ema_updates={self.ema_updates} + skipped_steps={self.skipped_steps}"
            )
        return self

    def advance(self, samples: int, *, taken: bool) -> None:
        """Count one iteration of `samples` samples over all ranks, taken or skipped."""
        self.step += 1
        self.samples_seen += samples
        if taken:
            self.ema_updates += 1
        else:
            self.skipped_steps += 1

    def to_json(self) -> dict[str, Any]:
        """The counters as JSON values."""
        return self.model_dump()

    @classmethod
    def from_json(cls, value: object) -> Self:
        """The counters in JSON values; ValueError (pydantic's) if types, ranges or sums are wrong."""
        return cls.model_validate(value)
