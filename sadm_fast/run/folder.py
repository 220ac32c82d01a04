"""A run's folder: where everything lies, and whose it is."""

import json
import os
from pathlib import Path
from typing import Any

from sadm_fast.config import Config, check_config
from sadm_fast.config_tree import CHANGEABLE, flatten, without
from sadm_fast.errors import UserError
from sadm_fast.files import expand_home, write_json, write_text


class RunFolder:
    """Paths inside runs/NAME, and the few small files that are written as a whole."""

    def __init__(self, path: str | Path) -> None:
        path = self.path = Path(expand_home(path))
        self.config = path / "config.json"
        self.facts = path / "run.json"
        self.metrics = path / "metrics.jsonl"
        self.evaluations = path / "evaluations.jsonl"
        self.broken = path / "broken.jsonl"
        self.tensorboard = path / "tensorboard"
        self.samples = path / "samples"
        self.relations = path / "relations"
        self.pretrained = path / "pretrained"
        self.checkpoints = path / "checkpoints"

    def check(self, config: Config) -> bool:
        """True if the folder holds a run of this configuration, False if it is free; writes nothing.

        Raises:
            UserError: it holds something else, or cannot be written.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"run folder {self.path}: is a file; choose another with --run-dir")
        try:
            str(self.path).encode()
        except UnicodeEncodeError:
            raise UserError(
                f"run folder {self.path}: the name is not UTF-8, as safetensors and TensorBoard need it; choose another"
                " with --run-dir"
            ) from None
        if not self.config.exists():
            if self.path.is_dir() and any(self.path.iterdir()):
                raise UserError(
                    f"run folder {self.path}: holds other files and no config.json; choose another with --run-dir"
                )
            parent = self.path
            while not parent.exists():
                parent = parent.parent
            self._writable(parent)
            return False
        self._writable(self.path)
        try:
            there = json.loads(self.config.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{self.config}: cannot be read ({error}); choose another folder with --run-dir") from None
        differences = _differences(there, config.resolved())
        if differences:
            raise UserError(
                f"run folder {self.path}: belongs to another configuration ({differences});"
                " choose another folder with --run-dir, or another name with --set name=..."
            )
        return True

    def _writable(self, path: Path) -> None:
        if not os.access(path, os.W_OK | os.X_OK):
            raise UserError(f"run folder {self.path}: {path} is not writable; choose another with --run-dir")

    def claim(self, config: Config) -> None:
        """Make the folder this configuration's; `check` has been asked before."""
        try:
            for folder in (self.samples, self.relations, self.pretrained, self.checkpoints):
                folder.mkdir(parents=True, exist_ok=True)
            write_json(self.config, config.resolved())
        except OSError as error:
            raise UserError(f"run folder {self.path}: {error.strerror}; choose another with --run-dir") from None

    def rewind(self, step: int) -> None:
        """Forget lines, grids and matrices of later steps: the run continues from `step` and makes them again."""
        for path in (*self.samples.glob("step-*.png"), *self.relations.glob("step-*.npz")):
            if int(path.name.split("-")[1].split(".")[0]) > step:
                path.unlink()
        for path in (self.metrics, self.evaluations):
            if not path.exists():
                continue
            kept = []
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line + "\n")
                except (ValueError, KeyError, TypeError):
                    continue  # torn by a crash; its step comes again
            write_text(path, "".join(kept))


def _differences(there: Any, here: dict[str, Any]) -> str:
    """What two resolved configurations differ in, apart from what a resumed run may change; "" for nothing."""
    try:
        old = flatten(without(check_config(there).resolved(), CHANGEABLE))
    except (UserError, ValueError, KeyError, AttributeError, TypeError):
        return "its config.json is of another version"
    new = flatten(without(here, CHANGEABLE))
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    shown = [f"{key}: {json.dumps(old.get(key))} there, {json.dumps(new.get(key))} here" for key in changed[:2]]
    return "; ".join(shown) + (f"; and {len(changed) - 2} more" if len(changed) > 2 else "")
