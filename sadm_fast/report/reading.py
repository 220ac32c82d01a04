"""Read a run's folder as far as it is written; nothing missing, half-written or odd is an error."""

import math
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from sadm_fast.config_tree import flatten
from sadm_fast.files import parse_json
from sadm_fast.metrics.judges import JUDGES
from sadm_fast.metrics.pretrained import PRETRAINED

Item = TypeVar("Item")
_LAST_STEP = 2**62
MODES = ("plain", "structure", "sadm")
JUDGE_OF = {judge.metric: judge for judge in (*JUDGES, *PRETRAINED.values())}


class Relations(NamedTuple):
    """One relations/step-N.npz: real and fake float64 [B, B], labels int64 [B], log_snr float64 [B]."""

    step: int
    real: np.ndarray
    fake: np.ndarray
    labels: np.ndarray
    log_snr: np.ndarray


@dataclass(frozen=True)
class Run:
    """A run's folder in memory; a field is empty if the folder has nothing for it (yet)."""

    path: Path
    name: str
    config: dict[str, Any]
    facts: dict[str, Any]  # run.json
    metrics: list[dict[str, Any]]
    scores: list[dict[str, Any]]  # evaluations.jsonl
    sweeps: dict[str, list[dict[str, Any]]]  # of evaluate.py --json, by the files' names
    raw_grids: dict[int, Path]
    ema_grids: dict[int, Path]
    real_grid: Path | None
    relations: dict[int, Path]
    unreadable: list[str]  # sentences about files that are there but cannot be read

    def setting(self, path: str) -> Any:
        """Return the config's value at a dotted path, or None."""
        return flatten(self.config).get(path)

    @property
    def mode(self) -> str | None:
        """plain, structure or sadm; None if the config does not say."""
        value = self.setting("game.mode")
        return value if value in MODES else None

    @property
    def variants(self) -> dict[str, list[dict[str, Any]]]:
        """Lines of scores by variant (`variant_of`). The first one is the first of the last evaluation's.

        Lines of older versions do not say what they are of: they are the first one's.
        """
        found: dict[str, list[dict[str, Any]]] = {}
        last = self.scores[-1]["step"] if self.scores else None
        here = [variant_of(row) for row in self.scores if row["step"] == last]
        named = [*here, *(variant_of(row) for row in reversed(self.scores))]
        first = next((name for name in named if name), "")
        for name in (first, *named):
            if name:
                found.setdefault(name, [])
        for row in self.scores:
            found.setdefault(variant_of(row) or first, []).append(row)
        return {name: rows for name, rows in found.items() if rows}

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The lines of scores of the first variant."""
        return next(iter(self.variants.values()), [])

    @property
    def step(self) -> int | None:
        """The last step for which anything was written."""
        steps = [row["step"] for row in (*self.metrics[-1:], *self.evaluations[-1:])]
        return max([*steps, *self.raw_grids, *self.ema_grids], default=None)

    @property
    def planned_steps(self) -> int | None:
        value = number(self.setting("train.steps"))
        return int(value) if value is not None and math.isfinite(value) else None

    @property
    def classes(self) -> list[str]:
        """Class names in label order."""
        names = self.facts.get("classes")
        return [str(name) for name in names] if isinstance(names, list) else []

    def class_name(self, label: int) -> str:
        return self.classes[label] if 0 <= label < len(self.classes) else str(label)

    @property
    def sample_grid(self) -> tuple[int, list[int]] | None:
        """The number of columns of a sample grid, and the label asked for in each cell, row by row."""
        layout = self.facts.get("sample_grid")
        if not isinstance(layout, dict):
            return None
        columns, labels = layout.get("columns"), layout.get("labels")
        if not isinstance(columns, int) or columns < 1 or not isinstance(labels, list) or not labels:
            return None
        return (columns, labels) if all(isinstance(label, int) for label in labels) else None

    @property
    def floor(self) -> dict[str, float]:
        """The distances of real images to other real images, by metric: those recorded last."""
        for row in reversed(self.evaluations):
            if isinstance(row.get("floor"), dict):
                return {metric: value for metric, it in row["floor"].items() if (value := number(it)) is not None}
        return {}

    @property
    def scored(self) -> list[str]:
        """The metrics that the evaluations wrote, in that order: names with a floor, and names of judges."""
        known = JUDGE_OF.keys() | self.floor.keys()
        return list(dict.fromkeys(key for row in self.evaluations for key in row if key in known))


def read_run(run_dir: Path) -> Run:
    """Read all that the report shows but pixels and matrices: those are opened one at a time, later."""
    unreadable: list[str] = []
    samples = run_dir / "samples"
    real_grid = samples / "real.png"
    return Run(
        path=run_dir,
        name=run_dir.resolve().name,
        config=_read_object(run_dir / "config.json", unreadable),
        facts=_read_object(run_dir / "run.json", unreadable),
        metrics=_read_rows(run_dir / "metrics.jsonl", unreadable),
        scores=_read_rows(run_dir / "evaluations.jsonl", unreadable),
        sweeps=_read_sweeps(run_dir),
        raw_grids=_files_by_step(samples, r"step-([0-9]{1,18})\.png"),
        ema_grids=_files_by_step(samples, r"step-([0-9]{1,18})-ema\.png"),
        real_grid=real_grid if real_grid.is_file() else None,
        relations=_files_by_step(run_dir / "relations", r"step-([0-9]{1,18})\.npz"),
        unreadable=unreadable,
    )


def read_relations(path: Path, step: int) -> Relations | None:
    """Read the matrices, sorted by class and in a class from clean to noisy; None if unreadable or empty."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            real, fake = (np.asarray(arrays[key], np.float64) for key in ("real", "fake"))
            labels = np.asarray(arrays["labels"], np.int64)
            log_snr = np.asarray(arrays["log_snr"], np.float64)
    except (OSError, KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile):
        return None
    size = labels.size
    if size < 2 or not (labels.shape == log_snr.shape == (size,) and real.shape == fake.shape == (size, size)):
        return None
    order = np.lexsort((-log_snr, labels))
    grid = np.ix_(order, order)
    return Relations(step, real[grid], fake[grid], labels[order], log_snr[order])


def number(value: object) -> float | None:
    """Return a JSON number as float (NaN and infinity included), and None for anything else."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:  # JSON integers have no limit, floats have
        return math.inf


def series(rows: Sequence[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and values, float64 [N] each, of the N rows with `key`; infinities become NaN: a gap in a plot."""
    pairs = [(row["step"], value) for row in rows if (value := number(row.get(key))) is not None]
    steps, values = np.asarray(pairs, np.float64).reshape(-1, 2).T
    return steps, np.where(np.isfinite(values), values, np.nan)


def evenly_chosen(items: Sequence[Item], count: int) -> list[Item]:
    """Choose at most `count` items: the first, the last, and evenly spaced ones in between."""
    if len(items) <= count:
        return list(items)
    return [items[round(index * (len(items) - 1) / (count - 1))] for index in range(count)]


def _read_object(path: Path, unreadable: list[str]) -> dict[str, Any]:
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        value = None
    if not isinstance(value, dict):
        unreadable.append(f"{path.name} is there but is not a readable JSON object.")
        return {}
    return value


def _read_rows(path: Path, unreadable: list[str]) -> list[dict[str, Any]]:
    """Read rows in step order. A resumed run repeats steps: a later row replaces one of the same step and variant."""
    try:
        text = path.read_bytes().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return []
    except OSError:
        unreadable.append(f"{path.name} is there but cannot be read.")
        return []
    *lines, unfinished = text.split("\n")  # the writer may be in the middle of the last line
    rows: list[dict[str, Any]] = []
    broken = 0
    for line in lines:
        row = _parse_row(line)
        if row is None:
            broken += bool(line.strip())
            continue
        _append(rows, row)
    if (row := _parse_row(unfinished)) is not None:
        _append(rows, row)
    if broken:
        unreadable.append(f"{path.name}: {broken} broken line{'s' if broken > 1 else ''} left out.")
    return rows


def _parse_row(line: str) -> dict[str, Any] | None:
    try:
        row = parse_json(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int or not 0 <= row["step"] <= _LAST_STEP:
        return None
    return row


def _append(rows: list[dict[str, Any]], row: dict[str, Any]) -> None:
    first = len(rows)
    while first and rows[first - 1]["step"] >= row["step"]:
        first -= 1
    others = [of for of in rows[first:] if of["step"] == row["step"] and variant_of(of) != variant_of(row)]
    rows[first:] = [*others, row]


def variant_of(row: dict[str, Any]) -> str:
    """Which average a line of scores is of, and its guidance: "power-0.05, guidance 1.5"; "" if it does not say."""
    weights, sampling = row.get("weights"), row.get("sampling")
    ema = weights.get("ema") if isinstance(weights, dict) else None
    guidance = sampling.get("guidance") if isinstance(sampling, dict) else None
    parts = []
    if isinstance(ema, dict) and (length := number(ema.get("std", ema.get("decay")))) is not None:
        parts.append(f"{ema.get('profile')}-{length:g}")
    if isinstance(guidance, dict) and (scale := number(guidance.get("scale"))) is not None:
        parts.append(f"guidance {scale:g}")
    return ", ".join(parts)


def _read_sweeps(run_dir: Path) -> dict[str, list[dict[str, Any]]]:
    """Lines of scores in the run's folder that evaluate.py --json wrote there."""
    found = {}
    for path in sorted(run_dir.glob("*.json")):
        try:
            rows = parse_json(path.read_text(encoding="utf-8"))["scores"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
            found[path.name] = rows
    return found


def _files_by_step(folder: Path, pattern: str) -> dict[int, Path]:
    try:
        found = [(re.fullmatch(pattern, path.name), path) for path in folder.iterdir()]
    except OSError:
        return {}
    return dict(sorted((int(match[1]), path) for match, path in found if match and path.is_file()))
