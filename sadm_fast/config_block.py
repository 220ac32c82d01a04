"""What the blocks of a configuration have in common: how strict they are, and fields that several of them hold."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from sadm_fast.errors import UserError
from sadm_fast.files import expand_home

MOST_STEPS = 10**9


class Block(BaseModel):
    """Unknown keys and loose types are errors; a loaded configuration does not change."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def _expanded(path: str) -> str:
    try:
        return expand_home(path)
    except UserError as error:
        raise PydanticCustomError("home", "{reason}", {"reason": str(error).partition(": ")[2]}) from None


FilePath = Annotated[str, AfterValidator(_expanded)]  # or a name that is no path: demo:mnist5k, a hub id


class ClassifierTraining(Block):
    steps: int = Field(400, ge=1, le=MOST_STEPS, description="optimizer steps")
    batch: int = Field(128, ge=1, le=2**20, description="images in a step, over all ranks")
    lr: float = Field(1e-2, gt=0, le=1e6, description="highest learning rate of a warm-up and a cosine")
    weight_decay: float = Field(0.05, ge=0, le=1e6, description="AdamW's, on matrices and filters only")


class PsiTraining(ClassifierTraining):
    """Psi's training, and two ways to give it a wrong structure on purpose."""

    steps: int = Field(400, ge=0, le=MOST_STEPS, description="optimizer steps; 0: Psi keeps its random first weights")
    labels: Literal["own", "shuffled"] = Field("own", description="shuffled: permuted over the images, once")

    @model_validator(mode="after")
    def _learned(self) -> Self:
        if self.labels == "shuffled" and not self.steps:
            raise ValueError("labels=shuffled: steps=0 learns no labels; use one or the other")
        return self
