"""One rank of test_checkpoint.py: trains, saves and trains on; in a second process, loads and trains on."""

import hashlib
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sadm_fast.config_training import PowerEMA
from sadm_fast.ema import EMA
from sadm_fast.engine.masters import gather, local_masters
from sadm_fast.errors import UserError
from sadm_fast.ranks.launch import Place, distributed
from sadm_fast.run import checkpoint
from sadm_fast.run.checkpoint_writer import CheckpointWriter
from sadm_fast.run.manifest import EMA_FILE, MANIFEST, Manifest
from sadm_fast.run.state import TrainState
from tests.support.engine_cases import STAGES, Case, stages
from tests.support.engine_game import Game

BEFORE, AFTER = 2, 2

CASES = [
    case
    for stage in STAGES
    for case in (
        Case(f"zero{stage}-fp32", "sadm", stage, 2, clipping=0.05),
        Case(f"zero{stage}-bf16", "sadm", stage, precision="bf16"),
    )
]
CASES.append(Case("unet", "sadm", 2, 2, unet=True))
CASES.append(Case("difffit", "sadm", 2, 2, difffit=True))
# It holds no whole number of steps: 8 samples on one rank, 16 on two.
CASES.append(Case("queue", "sadm", 2, 2, game={"queue": 20, "gate_log_snr": 0.5, "same_class": True}))


def cases_of(world_size: int) -> list[Case]:
    """The cases that so many ranks save."""
    return [case for case in CASES if case.stage in stages(world_size)]


class Run:
    """Players and their average."""

    def __init__(self, case: Case, place: Place, seeds: tuple[int, int]) -> None:
        self.game = Game(case, place, seeds)
        self.ema = EMA(lambda: list(local_masters(self.game.players.denoiser)), PowerEMA(profile="power", std=0.1))

    def train(self, first: int, count: int) -> None:
        for step in range(first, first + count):
            self.game.play(step)
            self.ema.update()

    def state(self) -> dict[str, dict[str, Tensor]]:
        found = {**self.game.weights(), "ema": gather(self.ema.average, self.game.shapes["denoiser"])}
        if self.game.players.queue is not None:
            found["queue"] = {name: value.clone() for name, value in self.game.players.queue.state().items()}
        return found


def trained(case: Case, folder: Path, place: Place) -> dict[str, Any]:
    """Train, save, train on."""
    run = Run(case, place, (1, 2))
    run.train(0, BEFORE)
    at_save = run.state()
    writer = CheckpointWriter(
        folder / case.name, run.game.players.engines, {EMA_FILE: lambda: run.ema.average}, run.game.shapes["denoiser"],
        identity={}, queue=run.game.players.queue, keep_last=1, say=print,
    )  # fmt: skip
    writer.save(TrainState(step=BEFORE, ema_updates=run.ema.updates))
    run.train(BEFORE, AFTER)  # the copy must not follow
    writer.finish()
    writer.close()
    room = sum(value.nbytes for copies in writer._make_room().result().values() for value in copies.values())
    return {"at_save": at_save, "at_end": run.state(), "room": room}


def resumed(case: Case, folder: Path, place: Place) -> dict[str, Any]:
    """Load into players that start elsewhere, and train on."""
    run = Run(case, place, (3, 4))
    found = checkpoint.find(folder / case.name, {}, print)
    assert found is not None
    (averages,), state = checkpoint.load(found, run.game.players.engines, run.game.players.queue)
    run.ema.load(averages, state.ema_updates)
    loaded = run.state()
    run.train(BEFORE, AFTER)
    return {"loaded": loaded, "at_end": run.state()}


def at_step(step: int) -> checkpoint.Found:
    """A checkpoint of a step, as much of it as ranks tell each other."""
    state = TrainState(step=step, ema_updates=step)
    files = {"ema.safetensors": 64 * "0"}
    return checkpoint.Found(
        Path("anywhere"), Manifest(step=step, world_size=1, state=state, optimizer_steps={}, files=files)
    )


def disagreed(place: Place) -> list[str]:
    """What is said where a rank finds no checkpoint, an older one or other data; nothing where all find the same."""
    same = at_step(7), {"data": "these", "samples_per_step": 4}
    said = []
    for other in (same, (None, same[1]), (at_step(5), same[1]), (same[0], {**same[1], "data": "those"})):
        found, identity = same if place.rank == 0 else other
        try:
            assert checkpoint.agreed(found, identity) == found
        except UserError as error:
            said.append(str(error))
    return said


def restaged(case: Case, place: Place) -> Case:
    """The same training at another ZeRO stage; on two ranks with half the accumulation of one."""
    return replace(case, stage=(case.stage + 1) % len(STAGES), accumulation=case.accumulation // place.world_size)


class Trap:
    """Unpickled, it makes a file: what a checkpoint from a stranger could do."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def trapped(case: Case, folder: Path, place: Place) -> dict[str, str]:
    """Each file of a checkpoint in turn replaced by a pickle that runs code, its hash made to fit."""
    run = Run(case, place, (3, 4))
    found = checkpoint.find(folder / case.name, {}, print)
    assert found is not None
    manifest = found.folder / MANIFEST
    whole = manifest.read_text()
    outcomes = {}
    for name, digest in found.manifest.files.items():
        path, sprung = found.folder / name, folder / "sprung"
        good = path.read_bytes()
        torch.save({"module": Trap(sprung)}, path)
        forged = json.loads(whole.replace(digest, hashlib.sha256(path.read_bytes()).hexdigest()))
        del forged["sha256"]  # as the first versions wrote it
        manifest.write_text(json.dumps(forged))
        checkpoint.read(found.folder)
        try:
            checkpoint.load(found, run.game.players.engines, run.game.players.queue)
            outcomes[name] = "loaded"
        except Exception as error:
            outcomes[name] = f"{type(error).__name__}: {error}"
        if sprung.exists():
            outcomes[name] = "ran code"
            sprung.rmdir()
        path.write_bytes(good)
    manifest.write_text(whole)
    return outcomes


def main(folder: Path, phase: str) -> None:
    with distributed() as place:
        mine = folder / f"rank-{place.rank}.pt"
        if phase == "elsewhere":  # with another number of ranks, at other stages
            cases = [case for case in cases_of(1) if case.precision == "fp32"]
            moved = {case.name: resumed(restaged(case, place), folder, place) for case in cases}
            torch.save(moved, folder / f"elsewhere-{place.rank}.pt")
            dist.barrier()
            return
        if phase == "train":
            found: dict[str, Any] = {case.name: trained(case, folder, place) for case in cases_of(place.world_size)}
        else:
            found = torch.load(mine, weights_only=True)
            for case in cases_of(place.world_size):
                found[case.name] |= {"resumed": resumed(case, folder, place)}
            found["disagreed"] = disagreed(place)
            if place.world_size == 1:
                found["trapped"] = {
                    case.name: trapped(case, folder, place) for case in cases_of(1) if case.precision == "fp32"
                }
        torch.save(found, mine)
        dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
