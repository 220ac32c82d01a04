"""Checkpoints that are whole or do not exist.

    checkpoints/step-000500/{denoiser/, discriminator/, ema.safetensors, rank-0.pt ..., COMPLETE}

Everything is written to step-000500.tmp/, synced to disk, renamed, and only then is COMPLETE added: a JSON manifest
with the hash of every file. A folder without it does not exist for the loader; one whose hashes do not match is named
and passed over for the one before. Loading runs no code: tensors come from safetensors or through
torch.load(weights_only=True), never from free pickles.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from sadm_fast.engine_files import load_engine, save_engine
from sadm_fast.errors import UserError
from sadm_fast.files import write_json

MANIFEST = "COMPLETE"
FORMAT = 1


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint folder."""
    return int(folder.name.removeprefix("step-"))


def completed(checkpoints: Path) -> list[Path]:
    """Checkpoint folders that were written to the end, oldest first."""
    folders = [path.parent for path in checkpoints.glob(f"step-*/{MANIFEST}") if path.parent.suffix != ".tmp"]
    return sorted(folders, key=step_of)


def save(
    checkpoints: Path,
    step: int,
    engines: Mapping[str, Any],
    ema: Mapping[str, Tensor],
    state: Mapping[str, Any],
    identity: Mapping[str, Any],
    keep_last: int,
) -> Path:
    """Write step-N; collective.

    Args:
        engines: DeepSpeed engines by player; called at a gradient-accumulation boundary.
        ema: full averaged parameters by name; needed on rank 0 only.
        state: this rank's counters, plain numbers.
        identity: what a loader must find equal (see `load_latest`).
        keep_last: older complete checkpoints are deleted.
    """
    final = checkpoints / f"step-{step:06d}"
    temporary = final.with_name(final.name + ".tmp")
    if _rank() == 0:
        # A folder of this name without COMPLETE, or a .tmp, is what a killed run left behind.
        for leftover in (temporary, final):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file({name: value.contiguous().cpu() for name, value in ema.items()}, temporary / "ema.safetensors")
    _barrier()
    torch.save(dict(state), temporary / f"rank-{_rank()}.pt")
    for name, engine in engines.items():
        save_engine(engine, temporary / name)
    _barrier()
    if _rank() == 0:
        hashes = {}
        for path in _files(temporary):
            _sync(path)
            hashes[str(path.relative_to(temporary))] = _sha256(path)
        for folder in (temporary, *(p for p in temporary.rglob("*") if p.is_dir())):
            _sync(folder)
        temporary.rename(final)
        _sync(checkpoints)
        write_json(final / MANIFEST, {"format": FORMAT, "step": step, **identity, "files": hashes})
        _sync(final)
        for old in completed(checkpoints)[:-keep_last]:
            (old / MANIFEST).unlink()  # first, so that a half-deleted folder is none
            shutil.rmtree(old)
    _barrier()
    return final


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        for name, digest in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if _sha256(path) != digest:
                return f"{name} does not match its hash"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    return None


def find(checkpoints: Path, identity: Mapping[str, Any], say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is whole, or None; damaged ones are named through `say`.

    Raises:
        UserError: it was written by another format, model or world size.
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


def load(folder: Path, engines: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Put a checkpoint's state into the engines; returns the full EMA and this rank's counters. Collective.

    Raises:
        UserError: a file holds something else than this code writes, or tries to run code.
    """
    try:
        for name, engine in engines.items():
            load_engine(engine, folder / name)
        state = torch.load(folder / f"rank-{_rank()}.pt", weights_only=True)
        return load_file(folder / "ema.safetensors"), state
    except Exception as error:  # what DeepSpeed raises on a foreign file depends on where it notices
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"checkpoint {folder}: cannot be loaded ({type(error).__name__}: {reason});"
            " use the code it was written with, or another --run-dir"
        ) from error
