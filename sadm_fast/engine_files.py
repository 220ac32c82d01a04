"""How an engine's state gets to the disk and back: DeepSpeed's own files, read without running anything in them."""

import os
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

# All that DeepSpeed 0.19.8 writes at stages 0-3 besides tensors and plain containers; the three hold numbers only.
_RECORDS = [LossScaler, ZeroStageEnum, fragment_address]


class SafeCheckpointEngine(TorchCheckpointEngine):
    """DeepSpeed's file format, flushed to the disk when written and read with weights_only=True."""

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        with open(path, "wb") as file:
            torch.save(state_dict, file, _use_new_zipfile_serialization=self.zipfile_serialization)
            file.flush()
            os.fsync(file.fileno())

    def load(self, path: str, map_location: Any = None) -> dict[str, Any]:
        with torch.serialization.safe_globals(_RECORDS):
            return torch.load(path, map_location=map_location, weights_only=True)


def use_safe_files(engine: Any) -> None:
    """Once, after deepspeed.initialize."""
    engine.checkpoint_engine = SafeCheckpointEngine(engine._config)
    engine._copy_recovery_script = lambda save_path: None  # no programs in a checkpoint folder


def save_engine(engine: Any, folder: Path) -> None:
    """Write folder/*.pt; collective, and only at an accumulation boundary."""
    engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)


def load_engine(engine: Any, folder: Path) -> None:
    """Read them into an engine of the same ZeRO stage, precision and world size; collective.

    Raises:
        FileNotFoundError: there is no engine state in the folder.
    """
    loaded, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    if loaded is None:
        raise FileNotFoundError(f"{folder}: holds no DeepSpeed state")
