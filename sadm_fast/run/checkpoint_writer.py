"""Writing checkpoints beside the training: the step waits for a copy in memory, threads do the rest.

    save      every rank copies its pieces into memory of its own, and its thread writes and syncs them in step-N.tmp/
    decide    at a later step boundary all ranks know that all parts are written (the flags travel with the vote that
              every iteration takes anyway); then rank 0's thread puts the averaged model together, renames the folder,
              and adds COMPLETE
    finish    at the end of a run: both, now

No collective is called from a thread. A save that fails (a full disk) says so and leaves the checkpoint before it
alone; training goes on.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sadm_fast.engine.feature_queue import FeatureQueue
from sadm_fast.engine.masters import Fragment
from sadm_fast.engine.state import MASTER, MOMENTS, pieces, steps_taken
from sadm_fast.files import write_json
from sadm_fast.ranks.collectives import barrier, max_over_ranks, rank_and_world_size
from sadm_fast.run.checkpoint import folder_of, sha256
from sadm_fast.run.manifest import MANIFEST, QUEUE_FILE, Manifest, completed, part_name, step_of
from sadm_fast.run.pieces import SavedPieces, key
from sadm_fast.run.state import TrainState

_EMA, _QUEUE = "ema", "queue"


class Snapshots(NamedTuple):
    """Averages that are kept: at multiples of `every` steps, each file under a name with {step} in `folder`."""

    folder: Path
    every: int
    files: Mapping[str, str]


class CheckpointWriter:
    """One run's checkpoints; one save is under way at a time.

    Args:
        engines: by player.
        averages: this rank's fragments of each average by the name of its file, asked at each save.
        shapes: full shapes of the averaged parameters.
        identity: what a loader must find equal (checkpoint.find).
        fixed: parameters that are not trained, written beside the averaged ones: the file is a whole state.
        metadata: of the averages' files; says what they lack to be one.
        queue: of features, if there is one; rank 0 writes it.
        keep_last, keep_every: checkpoints that stay: the newest ones, and those at multiples of keep_every steps.
        snapshots: which averages stay without the rest of their checkpoint.
        say: told on any rank, in one line, why a save failed.
    """

    def __init__(
        self,
        checkpoints: Path,
        engines: Mapping[str, Any],
        averages: Mapping[str, Callable[[], Sequence[Fragment]]],
        shapes: Mapping[str, tuple[int, ...]],
        *,
        identity: Mapping[str, Any],
        fixed: Mapping[str, Tensor] | None = None,
        metadata: Mapping[str, str] | None = None,
        queue: FeatureQueue | None = None,
        keep_last: int,
        keep_every: int | None = None,
        snapshots: Snapshots | None = None,
        say: Callable[[str], None],
    ) -> None:
        self._checkpoints, self._engines, self._averages = checkpoints, engines, averages
        self._shapes, self._identity, self._queue = shapes, dict(identity), queue
        self._fixed, self._metadata = dict(fixed or {}), dict(metadata or {})
        self._keep_last, self._keep_every, self._say = keep_last, keep_every, say
        self._snapshots = snapshots
        self._rank, self._world_size = rank_and_world_size()
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._part: Future[str | None] | None = None  # this rank's part of the save under way: what went wrong
        self._commit: Future[str | None] | None = None  # rank 0's last act
        self._step = 0  # of the save under way or the one before
        self._followed = 0  # checkpoints of earlier steps than this one count for keep_last
        self._facts: dict[str, Any] = {}  # its manifest but for the files
        self._copies: Future[dict[str, dict[str, Tensor]]] | None = None

    def save(self, state: TrainState) -> None:
        """Begin the checkpoint of a state. Collective; waits for the save before it."""
        self.finish()
        self._step = state.step
        temporary = folder_of(self._checkpoints, state.step).with_suffix(".tmp")
        if self._rank == 0:
            # A folder of this name without COMPLETE, or a .tmp, is what a killed run left behind.
            for leftover in (temporary, folder_of(self._checkpoints, state.step)):
                shutil.rmtree(leftover, ignore_errors=True)
        barrier()
        parts = {}
        for player, engine in self._engines.items():
            tensors = {key(kind, name, start): value for kind, name, start, value in pieces(engine)}
            parts[part_name(player, self._rank)] = self._copy(player, tensors)
        if self._queue is not None and self._rank == 0:  # the same on every rank
            parts[QUEUE_FILE] = self._copy(_QUEUE, self._queue.state())
        for name, average in self._own_averages().items():
            parts[_part_of(name, self._rank)] = self._copy(name, average)
        self._facts = {
            "step": state.step,
            **self._identity,
            "world_size": self._world_size,
            "state": state.to_json(),
            "optimizer_steps": {player: steps_taken(engine) for player, engine in self._engines.items()},
        }
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._part = self._pool.submit(self._write, temporary, parts)

    def status(self) -> tuple[bool, bool]:
        """(this rank's part is still being written, it has failed), for the vote."""
        if self._part is None:
            return False, False
        done = self._part.done()
        return not done, done and self._part.result() is not None

    def decide(self, writing: bool, failed: bool) -> None:
        """Commit or drop the save, once a vote has said whether any rank is still writing or has failed."""
        room = self._make_room()
        if room.done():
            room.result()  # no memory is an error now, and not at the first save
        if self._part is None or writing:
            return
        problem, self._part = self._part.result(), None
        step = self._step
        if problem is not None:
            self._say(f"checkpoint of step {step}: not saved ({problem}); the one before is kept, training goes on")
        if self._rank == 0:
            self._commit = self._pool.submit(self._drop if failed else self._complete, step)

    def finish(self) -> None:
        """Wait until the save under way is a checkpoint, or has failed. Collective."""
        if self._part is not None:
            failed = torch.tensor(int(self._part.result() is not None))
            self.decide(writing=False, failed=bool(max_over_ranks(failed)))
        if self._commit is not None:
            problem, self._commit = self._commit.result(), None
            if problem is not None:
                step = self._step
                self._say(f"checkpoint of step {step}: not saved ({problem}); the one before is kept")
        barrier()

    def followed(self, step: int) -> None:
        """Count checkpoints of steps before `step` as good: that step was finite. The others are kept besides.

        A checkpoint of weights that have diverged looks like any other; its next step does not.
        """
        before, self._followed = self._followed, step
        if self._rank == 0 and self._step and before <= self._step < step:
            self._pool.submit(self._retire)

    def close(self) -> None:
        """Finish the write in progress and end the thread."""
        self._pool.shutdown()

    def _own_averages(self) -> dict[str, dict[str, Tensor]]:
        """This rank's pieces of each average, by key; without ZeRO each rank owns everything, and rank 0 saves it."""
        if self._rank != 0 and all(engine.zero_optimization_stage() == 0 for engine in self._engines.values()):
            return {}
        return {
            file: {key(_EMA, name, start): value for name, start, value in average()}
            for file, average in self._averages.items()
        }

    def _make_room(self) -> "Future[dict[str, dict[str, Tensor]]]":
        """Allocate memory for all copies once, in the thread: clearing it takes seconds, beside the first steps."""
        if self._copies is None:
            like: dict[str, dict[str, Tensor]] = self._own_averages()
            for player, engine in self._engines.items():
                like[player] = {
                    key(each, name, start): value
                    for kind, name, start, value in pieces(engine)
                    for each in (kind, *(MOMENTS if kind == MASTER else ()))  # moments are not there before a step
                }
            if self._queue is not None:
                like[_QUEUE] = self._queue.state()
            self._copies = self._pool.submit(_empty_copies, like)
        return self._copies

    def _copy(self, player: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy the tensors to this rank's own memory, which does not change until the next save."""
        copies = self._make_room().result()[player]
        for there, value in tensors.items():
            copies[there].copy_(value, non_blocking=True)
        return {there: copies[there] for there in tensors}

    def _write(self, temporary: Path, parts: Mapping[str, Mapping[str, Tensor]]) -> str | None:
        """Write and sync this rank's files and their hashes; returns what went wrong, or None."""
        try:
            hashes = {}
            for name, tensors in parts.items():
                path = temporary / name
                path.parent.mkdir(parents=True, exist_ok=True)
                save_file(dict(tensors), path)
                _sync(path)
                hashes[name] = sha256(path)
            write_json(temporary / f"hashes-{self._rank}.json", hashes)
        except (OSError, SafetensorError) as error:
            return " ".join(str(error).split())[:200]
        return None

    def _complete(self, step: int) -> str | None:
        """Complete a checkpoint on rank 0: write the averaged model, rename, write COMPLETE, delete old ones."""
        final = folder_of(self._checkpoints, step)
        temporary = final.with_suffix(".tmp")
        try:
            hashes: dict[str, str] = {}
            for path in sorted(temporary.glob("hashes-*.json")):
                hashes |= json.loads(path.read_text())
                path.unlink()
            for file in self._averages:
                self._merge(temporary, file, hashes)
            for folder in (temporary, *(path for path in temporary.iterdir() if path.is_dir())):
                _sync(folder)
            temporary.rename(final)
            _sync(self._checkpoints)
            write_json(final / MANIFEST, Manifest.model_validate({**self._facts, "files": hashes}).to_json())
            _sync(final)
            self._keep_snapshots(final, step)
            self._retire()
        except (OSError, SafetensorError, KeyError) as error:
            self._drop(step)
            return " ".join(str(error).split())[:200]
        return None

    def _merge(self, folder: Path, file: str, hashes: dict[str, str]) -> None:
        """Put all ranks' parts of an average into one file, a whole state of the denoiser."""
        parts = [path for path in (folder / _part_of(file, rank) for rank in range(self._world_size)) if path.exists()]
        with SavedPieces(parts) as saved:
            whole = {
                name: saved.read(_EMA, name, 0, torch.Size(shape).numel()).view(shape)
                for name, shape in self._shapes.items()
            }
        save_file(whole | self._fixed, folder / file, self._metadata)
        for path in parts:
            del hashes[path.name]
            path.unlink()
        _sync(folder / file)
        hashes[file] = sha256(folder / file)

    def _keep_snapshots(self, checkpoint: Path, step: int) -> None:
        """Keep this checkpoint's averages beyond it, where they are asked for: the same files under another name."""
        if self._snapshots is None or step % self._snapshots.every:
            return
        for file, name in self._snapshots.files.items():
            there = self._snapshots.folder / name.format(step=step)
            there.parent.mkdir(parents=True, exist_ok=True)
            there.unlink(missing_ok=True)
            try:
                os.link(checkpoint / file, there)
            except OSError:  # a file system without links
                shutil.copyfile(checkpoint / file, there)
                _sync(there)

    def _drop(self, step: int) -> None:
        shutil.rmtree(folder_of(self._checkpoints, step).with_suffix(".tmp"), ignore_errors=True)

    def _retire(self) -> None:
        """Delete what is no longer kept."""
        good = [folder for folder in completed(self._checkpoints) if (step_of(folder) or 0) < self._followed]
        for old in good[: -self._keep_last]:
            if self._keep_every is None or (step_of(old) or 0) % self._keep_every:
                with suppress(OSError):  # then it stays, and so does the training
                    (old / MANIFEST).unlink()  # first, so that a half-deleted folder is none
                    shutil.rmtree(old)


def _empty_copies(like: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Allocate zeros in host memory; pinned where there is a GPU, which then copies without waiting."""

    def zeros(value: Tensor) -> Tensor:
        if value.device.type != "cuda":
            return torch.zeros(value.shape, dtype=value.dtype)
        with torch.cuda.device(value.device):  # a new thread stands at the first one
            return torch.zeros(value.shape, dtype=value.dtype, pin_memory=True)

    return {player: {there: zeros(value) for there, value in tensors.items()} for player, tensors in like.items()}


def _part_of(file: str, rank: int) -> str:
    """The file of one rank's part of an average, until all are merged."""
    return f"part-{rank}-of-{file}"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
