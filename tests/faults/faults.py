"""What can go wrong, and where: each fault is a call of a function that the trainer makes on its way."""

import json
from dataclasses import asdict, dataclass

WRITER, TRAINER, ENGINE = "sadm_fast.run.checkpoint_writer", "sadm_fast.trainer", "sadm_fast.engine.players"


@dataclass(frozen=True)
class Fault:
    """`action` on `rank` (None: all) at the `call`-th call of `target`, "module:name" where the code looks it up.

    when: "before" or "after" the call; "torn": a kill when half of the file it writes is there.
    again: at every later call too.
    """

    target: str
    call: int = 1
    rank: int | None = 0
    when: str = "before"
    action: str = "kill"
    again: bool = False

    def __str__(self) -> str:
        where = self.target.partition(":")[2]
        return f"{self.action} rank {self.rank} {self.when} call {self.call} of {where}"


def environment(*faults: Fault) -> dict[str, str]:
    """What faulty_train.py reads."""
    return {"SADM_FAULTS": json.dumps([asdict(fault) for fault in faults])}


def _save(name: str, call: int = 1, rank: int = 0, when: str = "before") -> Fault:
    return Fault(f"{WRITER}:{name}", call, rank, when)


# A save of two players on two ranks, ZeRO: each rank writes denoiser, discriminator and its average; rank 0 then
# merges the averages, renames, and adds COMPLETE. In the order in which it happens, on either rank.
BEFORE_IT_COUNTS: list[Fault] = [
    _save("CheckpointWriter.save"),
    _save("CheckpointWriter.save", rank=1),
    _save("CheckpointWriter._copy", 2),
    _save("CheckpointWriter._copy", 3, rank=1),
    _save("CheckpointWriter._write"),
    _save("CheckpointWriter._write", rank=1),
    _save("save_file", 1, when="torn"),
    _save("save_file", 2, rank=1, when="torn"),
    _save("save_file", 3, rank=1, when="after"),
    _save("_sync", 1),
    _save("_sync", 2, rank=1),
    _save("sha256", 3),
    _save("sha256", 3, rank=1),
    _save("write_json", 1),
    _save("write_json", 1, rank=1),
    _save("write_json", 1, when="after"),
    _save("write_json", 1, rank=1, when="after"),
    _save("CheckpointWriter.decide", 4),
    _save("CheckpointWriter.decide", 4, rank=1),
    _save("CheckpointWriter._complete"),
    _save("SavedPieces"),
    _save("save_file", 4, when="torn"),
    _save("sha256", 4),
    _save("_sync", 5),
    _save("_sync", 7),
    _save("Path.rename"),
    _save("Path.rename", when="after"),
    _save("write_json", 2),
]

# Late enough in a save, or in the next one, for a checkpoint to be there.
WHEN_ONE_IS_THERE: list[Fault] = [
    _save("CheckpointWriter.save", 2, when="after"),
    _save("CheckpointWriter.save", 2, rank=1, when="after"),
    _save("write_json", 2, when="after"),
    _save("CheckpointWriter._retire"),
    _save("CheckpointWriter._retire", 2, when="after"),
    _save("CheckpointWriter.finish", 2, rank=1, when="after"),
]
IN_A_SAVE = BEFORE_IT_COUNTS + WHEN_ONE_IS_THERE

# Only where Psi is not trained yet.
AT_THE_FIRST_START: list[Fault] = [
    Fault("sadm_fast.run.folder:RunFolder.claim"),
    Fault("sadm_fast.run.folder:write_json", when="after"),
    Fault("sadm_fast.classifier:_average_over_ranks", 3, rank=1),
    Fault("sadm_fast.train_once:_write"),
]

# Only where there is a checkpoint: one of these after each of WHEN_ONE_IS_THERE.
AT_A_RESUME: list[Fault] = [
    Fault("sadm_fast.run.checkpoint:find", when="after"),
    Fault("sadm_fast.run.checkpoint:load", rank=1),
    Fault("sadm_fast.run.checkpoint:restore", 2),
    Fault(f"{TRAINER}:EMA.load", rank=1, when="after"),
    Fault("sadm_fast.run.folder:RunFolder.rewind"),
    Fault("sadm_fast.run.folder:_rewind_lines", when="after"),
]

# Anywhere else in a training.
IN_A_STEP: list[Fault] = [
    Fault("sadm_fast.assemble:Players", rank=1),
    Fault("sadm_fast.assemble:Players", when="after"),
    Fault(f"{TRAINER}:make_loader", rank=1),
    Fault(f"{TRAINER}:draw_batch"),
    Fault(f"{TRAINER}:draw_batch", 2, rank=1, when="after"),
    Fault(f"{ENGINE}:predict", 2),
    Fault(f"{ENGINE}:predict", 3, rank=1, when="after"),
    Fault(f"{ENGINE}:Snapshot.take", 2, rank=1),
    Fault(f"{ENGINE}:discriminator_loss", 2, rank=1, when="after"),
    Fault(f"{ENGINE}:Players._backward", 3),
    Fault(f"{ENGINE}:Players._backward", 4, rank=1),
    Fault(f"{ENGINE}:structure_distance", 2, when="after"),
    Fault(f"{TRAINER}:EMA.update", 2),
    Fault(f"{TRAINER}:EMA.update", 2, rank=1, when="after"),
    Fault(f"{TRAINER}:Vote.ask", 3),
    Fault(f"{TRAINER}:Vote.ask", 3, rank=1, when="after"),
    Fault("sadm_fast.run.log:append_json", 2),
    Fault("sadm_fast.run.log:append_json", 3, when="after"),
    Fault("sadm_fast.gallery:grid_samples"),
    Fault("sadm_fast.gallery:save_picture", 2, when="after"),
    Fault("sadm_fast.gallery:gather", rank=1),
]

AT_THE_END = Fault(f"{TRAINER}:write_report")


def chains(count: int) -> list[list[Fault]]:
    """All kill points in `count` runs, each of which meets one at every start, in an order in which it can."""
    runs: list[list[Fault]] = [[] for _ in range(count)]
    for point in (*AT_THE_FIRST_START, *BEFORE_IT_COUNTS, *IN_A_STEP):
        min(runs, key=len).append(point)
    for run, saved, resumed in zip(runs, WHEN_ONE_IS_THERE, AT_A_RESUME, strict=False):
        run += [saved, resumed]
    runs[-1].append(AT_THE_END)
    return runs
