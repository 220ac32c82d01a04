"""A run's folder: its paths, and which run it belongs to."""

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from sadm_fast.config import Config, check_config
from sadm_fast.config_tree import CHANGEABLE, LEARNING_RATES, flatten, without
from sadm_fast.errors import UserError
from sadm_fast.files import LOCK, expand_home, locked, parse_json, replacing, write_json
from sadm_fast.ranks.collectives import only_on_rank_zero
from sadm_fast.run.manifest import completed

_LEFT_BY_A_START = {LOCK, "config.json.tmp"}  # that was killed before it wrote config.json
_HELD = "is training into it; wait for its end or stop it, or choose another folder with --run-dir"


class RunFolder:
    """Paths inside runs/NAME, and the few small files that are written as a whole."""

    def __init__(self, path: str | Path) -> None:
        path = self.path = Path(expand_home(path))
        self.config = path / "config.json"
        self.facts = path / "run.json"
        self.metrics = path / "metrics.jsonl"
        self.evaluations = path / "evaluations.jsonl"
        self.broken = path / "broken.jsonl"
        self.report = path / "report.html"
        self.tensorboard = path / "tensorboard"
        self.samples = path / "samples"
        self.real_grid = self.samples / "real.png"
        self.relations = path / "relations"
        self.memorisation = path / "memorisation"
        self.pretrained = path / "pretrained"
        self.checkpoints = path / "checkpoints"
        self.snapshots = path / "snapshots"

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
            if self.path.is_dir() and {path.name for path in self.path.iterdir()} - _LEFT_BY_A_START:
                raise UserError(
                    f"run folder {self.path}: holds other files and no config.json; choose another with --run-dir"
                )
            parent = self.path
            while not parent.exists():
                parent = parent.parent
            self._writable(parent)
            return False
        self._writable(self.path)
        self._kinds()
        try:
            there = parse_json(self.config.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{self.config}: cannot be read ({error}); choose another folder with --run-dir") from None
        differences = _differences(there, config.resolved())
        if differences and self._has_checkpoint():
            raise UserError(
                f"run folder {self.path}: belongs to another configuration ({differences});"
                " choose another folder with --run-dir, or another name with --set name=..."
            )
        return True

    def _kinds(self) -> None:
        """Raise UserError where a folder stands in a file's place, or a file in a folder's."""
        files = (self.config, self.facts, self.metrics, self.evaluations, self.broken, self.report, self.real_grid)
        folders = (self.tensorboard, self.samples, self.relations, self.pretrained, self.checkpoints)
        for path in (*files, *folders):
            if path.exists() and path.is_dir() != (path in folders):
                there, wanted = ("folder", "file") if path.is_dir() else ("file", "folder")
                raise UserError(
                    f"run folder {self.path}: {path.name} is a {there}, and a run needs a {wanted} there; move it away,"
                    " or choose another folder with --run-dir"
                )

    def _has_checkpoint(self) -> bool:
        """Whether there is anything to go on from; without it a run may begin anew with another configuration."""
        return bool(completed(self.checkpoints))

    def _writable(self, path: Path) -> None:
        if not os.access(path, os.W_OK | os.X_OK):
            raise UserError(f"run folder {self.path}: {path} is not writable; choose another with --run-dir")

    @contextmanager
    def held(self, config: Config, say: Callable[[str], None]) -> Iterator[None]:
        """Make the folder this configuration's, and keep other runs out of it until the end of the block. Collective.

        Other learning rates than before are told to `say`: config.json keeps the newest only.

        Raises:
            UserError: on every rank, if another run holds it, or it cannot be written.
        """

        def hold() -> None:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(self.path, f"run folder {self.path}", _HELD))
            except OSError as error:
                raise UserError(f"run folder {self.path}: {error.strerror}; choose another with --run-dir") from None
            if self.check(config):  # again: another run may have been quicker
                for line in _other_rates(parse_json(self.config.read_bytes()), config.resolved()):
                    say(line)
            self.claim(config)

        with ExitStack() as stack:
            only_on_rank_zero(hold)
            yield

    def claim(self, config: Config) -> None:
        """Write the configuration and make the folders; `check` has been asked before."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.config, config.resolved())
            for folder in (self.samples, self.relations, self.pretrained, self.checkpoints):
                folder.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"run folder {self.path}: {error.strerror}; choose another with --run-dir") from None

    def evaluations_of(self, step: int) -> list[dict[str, Any]]:
        """The lines of evaluations.jsonl of `step`; those that cannot be read are left out."""
        found = []
        for line in self.evaluations.read_bytes().splitlines() if self.evaluations.exists() else ():
            with suppress(ValueError, KeyError, TypeError):
                row = parse_json(line)
                if row["step"] == step:
                    found.append(row)
        return found

    def rewind(self, step: int, say: Callable[[str], None]) -> None:
        """Forget lines, grids and matrices of steps after `step`: the run continues from there and makes them again.

        Files of other names stay; lines that cannot be read, as a crash leaves them, go.
        """
        for path in (*self.samples.iterdir(), *self.relations.iterdir()):
            match = re.fullmatch(r"step-([0-9]{6,18})(-ema)?\.(png|npz)", path.name)
            if match and int(match[1]) > step and not path.is_dir():
                path.unlink()
        for path in (self.metrics, self.evaluations):
            if path.exists():
                _rewind_lines(path, step, say)


def _rewind_lines(path: Path, step: int, say: Callable[[str], None]) -> None:
    """Keep the lines of a JSON-lines file up to `step`."""
    lines = path.read_bytes().splitlines(keepends=True)
    kept, unreadable = [], 0
    for line in lines:
        try:
            if parse_json(line)["step"] <= step:
                kept.append(line if line.endswith(b"\n") else line + b"\n")
        except (ValueError, KeyError, TypeError):
            unreadable += bool(line.strip()) and line.endswith(b"\n")  # not if torn by a crash: its step comes again
    if unreadable:
        say(f"{path}: {unreadable} line(s) that cannot be read are left out")
    if kept != lines:
        with replacing(path) as temporary:
            temporary.write_bytes(b"".join(kept))


def _other_rates(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """A line for each learning rate that is another one now."""
    old, new = flatten(there), flatten(here)
    return [f"{key}: {old[key]} so far, {new[key]} from here on" for key in LEARNING_RATES if old[key] != new[key]]


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
