"""Checkpoints that are complete, or do not exist for a loader.

    checkpoints/step-000500/denoiser/rank-0.safetensors ...        what each player has learned (run/pieces.py)
    checkpoints/step-000500/discriminator/rank-0.safetensors ...
    checkpoints/step-000500/ema.safetensors                        the averaged denoiser, whole
    checkpoints/step-000500/queue.safetensors                      the feature queue, whole, where there is one
    checkpoints/step-000500/COMPLETE                               counters, identity, hashes (run/manifest.py)

A folder without COMPLETE does not exist for the loader. One that does not fit its COMPLETE is named, and the one before
is used. Everything is safetensors and JSON: loading runs no code. Any number of ranks at any ZeRO stage can load what
any other wrote. checkpoint_writer.py writes them.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sadm_fast.engine.feature_queue import FeatureQueue
from sadm_fast.engine.state import BUFFER, MASTER, restore
from sadm_fast.errors import UserError, sign_of_a_lost_rank
from sadm_fast.ranks.collectives import max_over_ranks, rank_and_world_size
from sadm_fast.run.manifest import (
    EMA_FILE,
    FORMAT,
    MANIFEST,
    QUEUE_FILE,
    Damaged,
    Manifest,
    OtherFormat,
    completed,
    folder_name,
)
from sadm_fast.run.pieces import SavedPieces
from sadm_fast.run.state import TrainState

_READERS = 4  # threads that hash a checkpoint: one reads less than disks deliver
_STRANGERS_NAMED = 3


class Found(NamedTuple):
    """A checkpoint whose files are those of its manifest."""

    folder: Path
    manifest: Manifest


def sha256(path: Path) -> str:
    """The hash of a file's contents, hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_of(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return checkpoints / folder_name(step)


def read(folder: Path) -> Manifest:
    """The manifest of a checkpoint, all of whose files are there and as they were written.

    Raises:
        Damaged, OtherFormat: they are not.
    """
    manifest = Manifest.read(folder)
    try:
        for name in manifest.files:
            if not (folder / name).is_file():
                raise Damaged(f"{name} is missing")
        with ThreadPoolExecutor(_READERS) as pool:
            hashes = pool.map(lambda name: sha256(folder / name), manifest.files)
            for (name, expected), found in zip(manifest.files.items(), hashes, strict=True):
                if found != expected:
                    raise Damaged(f"{name} does not match its hash")
    except OSError as error:
        raise Damaged(f"cannot be read ({error})") from None
    return manifest


def whole(checkpoints: Path, say: Callable[[str], None]) -> Iterator[Found]:
    """Whole checkpoints, newest first; damaged ones, and files in a folder that are not its own, are named by `say`.

    Raises:
        UserError: one is of another format.
    """
    for folder in reversed(completed(checkpoints)):
        try:
            manifest = read(folder)
        except Damaged as damage:
            say(f"checkpoint {folder}: damaged ({damage}); trying the one before")
            continue
        except OtherFormat as format:
            raise UserError(
                f"checkpoint {folder}: format {format}, this code reads {FORMAT};"
                " use the code it was written with, or another --run-dir"
            ) from None
        if strangers := _strangers(folder, manifest):
            more = f" and {len(strangers) - _STRANGERS_NAMED} more" if len(strangers) > _STRANGERS_NAMED else ""
            say(f"checkpoint {folder}: {', '.join(strangers[:_STRANGERS_NAMED])}{more} left unread: not in {MANIFEST}")
        yield Found(folder, manifest)


def _strangers(folder: Path, manifest: Manifest) -> list[str]:
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
    return sorted(there - manifest.files.keys() - {MANIFEST})


def find(
    checkpoints: Path,
    identity: Mapping[str, Any],
    say: Callable[[str], None],
    *,
    first: Mapping[str, Any] | None = None,
    remedies: Mapping[str, str] | None = None,
) -> Found | None:
    """The newest whole checkpoint, or None; `say` as in `whole`.

    Args:
        identity: what it must hold.
        first: what it must hold instead if one of the first versions wrote it.
        remedies: by key of `identity`, what to say if it differs, in place of both values.

    Raises:
        UserError: it was written in another format, or by a run that is not the one of `identity`.
    """
    found = next(whole(checkpoints, say), None)
    if found is None:
        return None
    expected = {**identity, **(first or {})} if found.manifest.sha256 is None else identity
    for key, value in expected.items():
        if (there := getattr(found.manifest, key)) != value:
            problem = f"is {there!r} there and {value!r} here; resume with the same, or choose another --run-dir"
            raise UserError(f"checkpoint {found.folder}: {key} {(remedies or {}).get(key, problem)}")
    return found


def set_aside(folder: Path) -> Path:
    """Give a checkpoint a name under which it is not found; returns its new place."""
    aside = folder.with_name(f"diverged-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    return folder.rename(aside)


def agreed(found: Found | None, identity: Mapping[str, Any]) -> Found | None:
    """Return `found` once all ranks have confirmed the same checkpoint of the same run. Collective.

    Raises:
        UserError: on every rank, if they have not: machines may have other files, or see shared ones too late.
    """
    rank, world_size = rank_and_world_size()
    if world_size == 1:
        return found
    mine = [-1 if found is None else found.manifest.step, *map(_number, identity.values())]
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
    found: Found, engines: Mapping[str, Any], queue: FeatureQueue | None = None, averages: Sequence[str] = (EMA_FILE,)
) -> tuple[list[dict[str, Tensor]], TrainState]:
    """Put a checkpoint's state into engines and queue; returns the whole averages, and the counters. Collective.

    averages: the names of their files.

    Raises:
        UserError: a file does not hold what this code writes for such a model.
    """
    folder, manifest = found
    try:
        for player, engine in engines.items():
            with SavedPieces(folder / name for name in manifest.parts_of(player)) as saved:
                restore(engine, saved.read, manifest.optimizer_steps[player])
        if queue is not None:
            queue.load(load_file(folder / QUEUE_FILE))
        return [load_file(folder / name) for name in averages], manifest.state.model_copy()
    except Exception as error:  # whichever library notices first that a file is not what it should be
        if sign_of_a_lost_rank(error) is not None:
            raise
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"checkpoint {folder}: cannot be loaded ({type(error).__name__}: {reason});"
            " use the code it was written with, or another --run-dir"
        ) from error


@torch.no_grad()
def load_player(folder: Path, player: str, network: nn.Module) -> None:
    """Put a player's fp32 weights and buffers, as a checkpoint's ranks wrote them, into a network of one process.

    Raises:
        UserError: the checkpoint does not hold this player, or not these weights.
    """
    try:
        with SavedPieces(folder / name for name in Manifest.read(folder).parts_of(player)) as saved:
            trained = [(MASTER, *named) for named in network.named_parameters() if named[1].requires_grad]
            buffers = [(BUFFER, *named) for named in network.named_buffers() if named[1].numel()]
            for kind, name, value in [*trained, *buffers]:
                value.copy_(saved.read(kind, name, 0, value.numel()).view_as(value))
    except (OSError, KeyError, RuntimeError, SafetensorError, Damaged, OtherFormat) as error:
        raise UserError(f"checkpoint {folder}: the {player} cannot be loaded ({error})") from None
