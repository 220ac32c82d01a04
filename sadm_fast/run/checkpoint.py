"""Checkpoints that are whole or do not exist.

    checkpoints/step-000500/denoiser/rank-0.safetensors ...        what each player has learned (engine/state.py)
    checkpoints/step-000500/discriminator/rank-0.safetensors ...
    checkpoints/step-000500/ema.safetensors                        the averaged denoiser, whole
    checkpoints/step-000500/queue.safetensors                      the feature queue, whole, where there is one
    checkpoints/step-000500/COMPLETE                               JSON: counters, identity, the hash of every file

A folder without COMPLETE does not exist for the loader; one whose hashes do not match is named and passed over for the
one before. Everything is safetensors and JSON: loading runs no code. How many ranks wrote it, and at which ZeRO stage,
does not matter to those that read it. checkpoint_writer.py writes them.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from sadm_fast.engine.feature_queue import FeatureQueue
from sadm_fast.engine.state import SavedPieces, restore
from sadm_fast.errors import UserError, sign_of_a_lost_rank
from sadm_fast.ranks.collectives import max_over_ranks, rank_and_world_size

MANIFEST = "COMPLETE"
QUEUE = "queue"
FORMAT = 2

_READERS = 4  # a checkpoint is hashed by so many threads: one reads less than disks deliver


def sha256(path: Path) -> str:
    """Of a file's contents, hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_of(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return checkpoints / f"step-{step:06d}"


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint folder."""
    return int(folder.name.removeprefix("step-"))


def completed(checkpoints: Path) -> list[Path]:
    """Checkpoint folders that were written to the end, oldest first."""
    folders = [path.parent for path in checkpoints.glob(f"step-*/{MANIFEST}") if path.parent.suffix != ".tmp"]
    return sorted(folders, key=step_of)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        for name in files:
            if not (folder / name).is_file():
                return f"{name} is missing"
        with ThreadPoolExecutor(_READERS) as pool:
            for name, found in zip(files, pool.map(lambda name: sha256(folder / name), files), strict=True):
                if found != files[name]:
                    return f"{name} does not match its hash"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    return None


def find(checkpoints: Path, identity: Mapping[str, Any], say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is whole, or None; damaged ones are named through `say`.

    Raises:
        UserError: it was written by another format, or by a run that is not the one of `identity`.
    """
    for folder in reversed(completed(checkpoints)):
        problem = damage(folder)
        if problem is not None:
            say(f"checkpoint {folder}: damaged ({problem}); trying the one before")
            continue
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest.get("format") != FORMAT:
            raise UserError(
                f"checkpoint {folder}: format {manifest.get('format')}, this code reads {FORMAT};"
                " use the code it was written with, or another --run-dir"
            )
        for key, value in identity.items():
            if manifest.get(key) != value:
                raise UserError(
                    f"checkpoint {folder}: {key} is {manifest.get(key)!r} there and {value!r} here;"
                    " resume with the same, or choose another --run-dir"
                )
        return folder
    return None


def agreed(found: Path | None, identity: Mapping[str, Any]) -> Path | None:
    """What this rank has found, if every rank has found the same, for the same run. Collective.

    Raises:
        UserError: on every rank, if they have not: machines may have other files, or see shared ones too late.
    """
    rank, world_size = rank_and_world_size()
    if world_size == 1:
        return found
    mine = [-1 if found is None else step_of(found), *map(_number, identity.values())]
    ends = max_over_ranks(torch.tensor([mine, [-value for value in mine]]))
    differ = (ends[0] != -ends[1]).tolist()
    for key, differs in zip(identity, differ[1:], strict=True):
        if differs:
            raise UserError(
                f"ranks disagree: {key} is {identity[key]!r} on rank {rank} and something else on another;"
                " all machines must read the same configuration and data (docs/scale.md)"
            )
    if differ[0]:
        newest, oldest = int(ends[0, 0]), -int(ends[1, 0])
        raise UserError(
            f"ranks disagree: the newest whole checkpoint is step {newest} for one and"
            f" {'none' if oldest < 0 else f'step {oldest}'} for another; all machines must see the same run folder"
            " (docs/scale.md): give them time, and start again"
        )
    return found


def _number(value: Any) -> int:
    return int(hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:15], 16)


def load(
    folder: Path, engines: Mapping[str, Any], queue: FeatureQueue | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Put a checkpoint's state into engines and queue; returns the whole EMA by name, and the counters. Collective.

    Raises:
        UserError: a file does not hold what this code writes for such a model.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        for name, engine in engines.items():
            with SavedPieces(sorted((folder / name).glob("rank-*.safetensors"))) as saved:
                restore(engine, saved, int(manifest["optimizer_steps"][name]))
        if queue is not None:
            queue.load(load_file(folder / f"{QUEUE}.safetensors"))
        return load_file(folder / "ema.safetensors"), dict(manifest["state"])
    except Exception as error:  # whichever library notices first that a file is not what it should be
        if sign_of_a_lost_rank(error) is not None:
            raise
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"checkpoint {folder}: cannot be loaded ({type(error).__name__}: {reason});"
            " use the code it was written with, or another --run-dir"
        ) from error
