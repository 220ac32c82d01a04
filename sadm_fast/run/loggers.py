"""Where a run's numbers and pictures go beside metrics.jsonl: TensorBoard, Weights & Biases, trackio (`logging`).

Each is a Logger. Weights & Biases and trackio are offline until they are told otherwise in their own ways: WANDB_MODE,
TRACKIO_SPACE_ID and so on. Tests have stand-ins; wandb 0.31.0 and trackio 0.43.0 were tried by hand, a resumed run too.
They are imported where they are asked for, and are no part of an installation.
"""

import importlib
import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from sadm_fast.errors import UserError
from sadm_fast.run.folder import RunFolder


class Logger(Protocol):
    """Takes numbers and pictures of a step; a run that goes on from an earlier step writes the later ones again."""

    def scalars(self, values: Mapping[str, float | int], step: int) -> None: ...

    def image(self, name: str, picture: Tensor, step: int) -> None:
        """picture: uint8 [C, H, W]."""

    def close(self) -> None:
        """Write what is not written yet."""


class TensorBoard:
    def __init__(self, folder: Path, first_step: int) -> None:
        self._writer = SummaryWriter(str(folder), purge_step=first_step or None)

    def scalars(self, values: Mapping[str, float | int], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def image(self, name: str, picture: Tensor, step: int) -> None:
        self._writer.add_image(name, picture, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """One W&B run for one run's folder, of the same name; it goes on when the run does."""

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any]) -> None:
        os.environ.setdefault("WANDB_MODE", "offline")
        self._wandb: Any = importlib.import_module("wandb")
        self._run = self._wandb.init(
            project="sadm_fast", name=name, id=name, dir=str(folder), config=dict(config), resume="allow"
        )

    def scalars(self, values: Mapping[str, float | int], step: int) -> None:
        self._run.log(dict(values), step=step)

    def image(self, name: str, picture: Tensor, step: int) -> None:
        self._run.log({name: self._wandb.Image(picture.permute(1, 2, 0).cpu().numpy())}, step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """One trackio run for one run's folder, of the same name; numbers only."""

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any]) -> None:
        os.environ.setdefault("TRACKIO_DIR", str(folder / "trackio"))
        self._trackio: Any = importlib.import_module("trackio")
        self._trackio.init(project="sadm_fast", name=name, config=dict(config), resume="allow")

    def scalars(self, values: Mapping[str, float | int], step: int) -> None:
        self._trackio.log(dict(values), step=step)

    def image(self, name: str, picture: Tensor, step: int) -> None:
        """Pictures are in the run's folder."""

    def close(self) -> None:
        self._trackio.finish()


def check_loggers(names: Sequence[str]) -> None:
    """Raise UserError if a logger that is asked for is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise UserError(f"logging={name}: it is not installed; pip install {name}, or leave it out of logging")


def loggers(names: Sequence[str], folder: RunFolder, config: Mapping[str, Any], first_step: int) -> list[Logger]:
    """Open the loggers of these names; `config` is what they keep beside the numbers."""
    made: list[Logger] = []
    run = folder.path.resolve().name
    for name in names:
        if name == "tensorboard":
            made.append(TensorBoard(folder.tensorboard, first_step))
        elif name == "wandb":
            made.append(WeightsAndBiases(folder.path, run, config))
        else:
            made.append(Trackio(folder.path, run, config))
    return made
