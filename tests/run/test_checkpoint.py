"""Checkpoints that are whole or do not exist, run no code, and continue a run bit for bit."""

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import save_file
from torch import Tensor, nn

from sadm_fast.engine.masters import Fragment
from sadm_fast.errors import UserError
from sadm_fast.run import checkpoint, checkpoint_writer
from sadm_fast.run.checkpoint_writer import CheckpointWriter
from sadm_fast.run.manifest import EMA_FILE, MANIFEST
from sadm_fast.run.pieces import key
from sadm_fast.run.state import TrainState
from tests.engine.test_players import FP32_WEIGHTS
from tests.support.checkpoint_worker import cases_of
from tests.support.ranks import folder_of_run, run_once, run_ranks

IDENTITY = {"configuration": "abc", "samples_per_step": 8}
PART = "psi/rank-0.safetensors"


class Untrained:
    """As much of an engine as a checkpoint asks for: a network without trainable parameters, and its optimizer."""

    global_rank = 0

    def __init__(self) -> None:
        self.module = nn.BatchNorm1d(3, affine=False)
        self.optimizer = torch.optim.AdamW([torch.zeros(())])

    def zero_optimization_stage(self) -> int:
        return 0


@contextmanager
def writing(checkpoints: Path, value: float = 0.0, keep_last: int = 5, **options: Any) -> Iterator[CheckpointWriter]:
    """A writer of checkpoints with an average of `value` everywhere."""
    average = [Fragment("weight", 0, torch.full((6,), value))]
    said: list[str] = options.pop("said", [])
    writer = CheckpointWriter(
        checkpoints, {"psi": Untrained()}, {EMA_FILE: lambda: average}, {"weight": (3, 2)},
        identity=IDENTITY, keep_last=keep_last, say=said.append, **options,
    )  # fmt: skip
    try:
        yield writer
    finally:
        writer.close()


def at(step: int) -> TrainState:
    """A run of IDENTITY after so many steps, none of them skipped."""
    return TrainState(step=step, samples_seen=8 * step, ema_updates=step)


def save(checkpoints: Path, step: int, keep_last: int = 5, value: float = 0.0, **options: Any) -> Path:
    """A whole checkpoint."""
    with writing(checkpoints, value, keep_last, **options) as writer:
        writer.save(at(step))
        writer.finish()
        writer.followed(step + 1)
    return checkpoint.folder_of(checkpoints, step)


def find(checkpoints: Path, identity: dict[str, Any] | None = None) -> tuple[Path | None, list[str]]:
    """The chosen checkpoint and what was said about others."""
    said: list[str] = []
    found = checkpoint.find(checkpoints, IDENTITY if identity is None else identity, said.append)
    return None if found is None else found.folder, said


def load(folder: Path, engines: dict[str, Any] | None = None) -> tuple[dict[str, Tensor], TrainState]:
    """The average and the counters of a checkpoint, its engines restored."""
    (average,), state = checkpoint.load(checkpoint.Found(folder, checkpoint.read(folder)), engines or {})
    return average, state


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_saved_checkpoint_is_found_and_loaded(tmp_path: Path):
    save(tmp_path, 5, value=1.0)
    newest = save(tmp_path, 10, value=2.0)
    assert find(tmp_path) == (newest, [])
    ema, state = load(newest)
    assert torch.equal(ema["weight"], torch.full((3, 2), 2.0))
    assert state == at(10)
    manifest = json.loads((newest / "COMPLETE").read_text())
    assert manifest["step"] == 10 and manifest["configuration"] == "abc"
    assert sorted(manifest["files"]) == ["ema.safetensors", PART]
    assert sorted(str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file()) == [
        "COMPLETE", "ema.safetensors", PART,
    ]  # fmt: skip


def test_an_empty_or_missing_folder_has_no_checkpoint(tmp_path: Path):
    assert find(tmp_path) == (None, [])
    assert find(tmp_path / "missing") == (None, [])


def test_steps_are_compared_as_numbers(tmp_path: Path):
    save(tmp_path, 999_999)
    newest = save(tmp_path, 1_000_000)
    assert find(tmp_path)[0] == newest


def test_folders_that_were_not_finished_do_not_exist(tmp_path: Path):
    whole = save(tmp_path, 5)
    (save(tmp_path, 10) / "COMPLETE").unlink()
    save(tmp_path, 15).rename(tmp_path / "step-000015.tmp")
    assert checkpoint.completed(tmp_path) == [whole]
    assert find(tmp_path) == (whole, [])


# How often a save without engines calls what touches the disk.
CALLS = {"save_file": 3, "_sync": 7, "sha256": 3, "Path.rename": 1, "write_json": 2, "SavedPieces": 1}


@pytest.mark.parametrize(("where", "count"), [(where, count) for where in CALLS for count in range(CALLS[where])])
def test_a_kill_at_any_write_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, count: int
):
    """`count` calls go through, and nothing after the next one happens."""
    whole = save(tmp_path, 5, keep_last=1)
    calls = iter(range(count))

    class Killed(BaseException):
        pass

    target, name = (Path, "rename") if where == "Path.rename" else (checkpoint_writer, where)
    real = getattr(target, name)

    def kill(*arguments: Any, **options: Any) -> Any:
        if next(calls, None) is None:
            raise Killed
        return real(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(target, name, kill)
        with pytest.raises(Killed):
            save(tmp_path, 10, keep_last=1)
    # After COMPLETE is written the new checkpoint counts.
    newest = checkpoint.folder_of(tmp_path, 10) if (where, count) == ("_sync", 6) else whole
    assert find(tmp_path) == (newest, [])
    # What was left behind is in nobody's way.
    again = save(tmp_path, 10, keep_last=1)
    assert find(tmp_path) == (again, [])
    assert [path.name for path in tmp_path.iterdir()] == [again.name]


def test_a_kill_while_old_checkpoints_are_deleted_leaves_no_half_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save(tmp_path, 5)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_writer.shutil, "rmtree", lambda path, ignore_errors=False: None)
        newest = save(tmp_path, 10, keep_last=1)
    assert (tmp_path / "step-000005").exists()
    assert checkpoint.completed(tmp_path) == [newest]


@pytest.mark.parametrize("where", ["save_file", "_sync", "write_json", "Path.rename"])
def test_a_full_disk_costs_only_the_save_it_meets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str):
    whole, said = save(tmp_path, 5), list[str]()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with writing(tmp_path, value=3.0, said=said) as writer:
        with monkeypatch.context() as patched:
            target: Any = Path if where == "Path.rename" else checkpoint_writer
            patched.setattr(target, where.removeprefix("Path."), full)
            writer.save(at(10))
            writer.finish()
        assert len(said) == 1 and said[0].startswith("checkpoint of step 10: not saved (")
        assert "No space left on device" in said[0] and "the one before is kept" in said[0]
        assert find(tmp_path) == (whole, []) and not (tmp_path / "step-000010.tmp").exists()
        writer.save(at(15))
        writer.finish()
    assert load(checkpoint.folder_of(tmp_path, 15))[1] == at(15) and len(said) == 1


def test_the_training_does_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    disk = threading.Event()
    real = checkpoint_writer.save_file

    def slow(*arguments: Any) -> None:
        assert disk.wait(60)
        real(*arguments)

    monkeypatch.setattr(checkpoint_writer, "save_file", slow)
    with writing(tmp_path) as writer:
        writer.save(at(5))
        assert writer.status() == (True, False)  # and we are here: save has returned
        writer.decide(*writer.status())
        assert find(tmp_path) == (None, [])
        disk.set()
        writer.finish()
        assert writer.status() == (False, False)
    assert find(tmp_path)[0] == checkpoint.folder_of(tmp_path, 5)


def test_what_changes_after_a_save_is_not_in_it(tmp_path: Path):
    value = torch.full((6,), 1.0)
    writer = CheckpointWriter(
        tmp_path, {}, {EMA_FILE: lambda: [Fragment("weight", 0, value)]}, {"weight": (3, 2)},
        identity=IDENTITY, keep_last=1, say=print,
    )  # fmt: skip
    writer.save(at(5))
    value.fill_(2.0)
    writer.finish()
    assert load(checkpoint.folder_of(tmp_path, 5))[0]["weight"].unique().tolist() == [1.0]
    writer.close()


def test_checkpoints_at_round_steps_stay(tmp_path: Path):
    for step in (5, 10, 15, 20, 25):
        save(tmp_path, step, keep_last=1, keep_every=10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000010", "step-000020", "step-000025"]


def test_only_the_last_ones_are_kept(tmp_path: Path):
    for step in (5, 10, 15, 20):
        save(tmp_path, step, keep_last=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000015", "step-000020"]


def test_a_checkpoint_counts_once_a_finite_step_has_followed_it(tmp_path: Path):
    save(tmp_path, 5)
    with writing(tmp_path, keep_last=1) as writer:
        for step in (10, 15):
            writer.followed(step)
            writer.save(at(step))
            writer.finish()
    assert [path.name for path in checkpoint.completed(tmp_path)] == ["step-000010", "step-000015"]
    with writing(tmp_path, keep_last=1) as writer:
        writer.followed(19)
        writer.save(at(20))
        writer.finish()
        assert [path.name for path in checkpoint.completed(tmp_path)] == ["step-000015", "step-000020"]
        writer.followed(21)
    assert [path.name for path in checkpoint.completed(tmp_path)] == ["step-000020"]


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


Damage = Callable[[Path], Any]


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda folder: flip_a_bit(folder / "ema.safetensors"), "ema.safetensors does not match its hash"),
        (lambda folder: (folder / PART).unlink(), f"{PART} is missing"),
        (lambda folder: (folder / PART).write_bytes(b""), f"{PART} does not match its hash"),
        (lambda folder: (folder / "COMPLETE").write_text("{"), "COMPLETE cannot be read"),
        (lambda folder: (folder / "COMPLETE").write_text("[]"), "COMPLETE cannot be read"),
        (lambda folder: (folder / "COMPLETE").write_text(100_000 * "["), "COMPLETE cannot be read"),
        (lambda folder: (folder / "COMPLETE").write_bytes(b"\xff{"), "COMPLETE cannot be read"),
        (lambda folder: (folder / "COMPLETE").write_text('{"step": 1' + 5000 * "0" + "}"), "COMPLETE cannot be read"),
        (lambda folder: [(folder / "COMPLETE").unlink(), (folder / "COMPLETE").mkdir()], "COMPLETE cannot be read"),
        (lambda folder: [(folder / PART).unlink(), (folder / PART).mkdir()], f"{PART} is missing"),
    ],
)
def test_damage_is_named_and_the_checkpoint_before_is_used(tmp_path: Path, damage: Damage, named: str):
    whole, newest = save(tmp_path, 5), save(tmp_path, 10)
    damage(newest)
    found, said = find(tmp_path)
    assert found == whole
    assert len(said) == 1 and named in said[0] and str(newest) in said[0]


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change COMPLETE as the first versions could have written it: without a hash of itself."""
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["sha256"]
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_a_checkpoint_of_the_first_versions_is_loaded(tmp_path: Path):
    folder = save(tmp_path, 5)
    rewrite(folder, lambda _: None)
    assert find(tmp_path) == (folder, []) and load(folder)[1] == at(5)


def test_a_checkpoint_of_the_first_versions_may_have_another_identity(tmp_path: Path):
    folder = save(tmp_path, 5)
    first = {"configuration": "abc"}
    with pytest.raises(UserError, match="configuration is 'abc' there and 'new' here"):
        checkpoint.find(tmp_path, {"configuration": "new"}, print, first=first)
    rewrite(folder, lambda _: None)
    assert checkpoint.find(tmp_path, {"configuration": "new"}, print, first=first) is not None
    with pytest.raises(UserError, match="configuration is 'abc' there and 'other' here"):
        checkpoint.find(tmp_path, {"configuration": "abc"}, print, first={"configuration": "other"})


@pytest.mark.parametrize("field", ["step", "samples_per_step", "world_size", "format"])
def test_a_value_in_complete_that_has_changed_is_damage(tmp_path: Path, field: str):
    whole, newest = save(tmp_path, 5), save(tmp_path, 10)
    manifest = json.loads((newest / MANIFEST).read_text())
    (newest / MANIFEST).write_text(json.dumps({**manifest, field: manifest[field] + 1}))
    found, said = find(tmp_path)
    assert found == whole and len(said) == 1 and "COMPLETE cannot be read (it does not match its own hash)" in said[0]


Change = Callable[[dict[str, Any]], Any]
IMPOSSIBLE: dict[str, Change] = {
    "step=-5": lambda m: m.update(step=-5),
    'step="30"': lambda m: m.update(step="30"),
    "step=null": lambda m: m.update(step=None),
    "step=true": lambda m: m.update(step=True),
    "step=1000": lambda m: m.update(step=1000),
    "state.step=1000": lambda m: m["state"].update(step=1000),
    "samples_seen=0": lambda m: m["state"].update(samples_seen=0),
    'samples_seen="x"': lambda m: m["state"].update(samples_seen="x"),
    'seconds="x"': lambda m: m["state"].update(seconds="x"),
    "seconds=-1": lambda m: m["state"].update(seconds=-1.0),
    "seconds=Infinity": lambda m: m["state"].update(seconds=float("inf")),
    "seconds is missing": lambda m: m["state"].pop("seconds"),
    "ema_updates=-1": lambda m: m["state"].update(ema_updates=-1),
    "skipped_steps=1": lambda m: m["state"].update(skipped_steps=1),
    "optimizer_steps=10^21": lambda m: m["optimizer_steps"].update(psi=10**21),
    "optimizer_steps={}": lambda m: m.update(optimizer_steps={}),
    "world_size=10^9": lambda m: m.update(world_size=10**9),
    "state=[]": lambda m: m.update(state=[]),
    "files={}": lambda m: m.update(files={}),
    "files=[]": lambda m: m.update(files=[]),
    "no files": lambda m: m.pop("files"),
    "a file left out": lambda m: m["files"].pop(PART),
    "a file outside": lambda m: m["files"].update({"../step-000005/ema.safetensors": 64 * "0"}),
    "an unknown key": lambda m: m.update(extra=1),
}  # fmt: skip


@pytest.mark.parametrize("change", IMPOSSIBLE)
def test_a_complete_that_cannot_be_right_is_damage_even_without_its_hash(tmp_path: Path, change: str):
    whole, newest = save(tmp_path, 5), save(tmp_path, 10)
    rewrite(newest, IMPOSSIBLE[change])
    found, said = find(tmp_path)
    assert found == whole
    assert len(said) == 1 and "\n" not in said[0] and f"checkpoint {newest}: damaged (COMPLETE " in said[0]


def test_only_the_files_that_complete_lists_are_read(tmp_path: Path):
    newest, engine = save(tmp_path, 10), Untrained()
    engine.module.get_buffer("running_mean").fill_(7.0)
    for name in ("rank-0 (copy).safetensors", "rank-0-old.safetensors", "rank-0.bak.safetensors", "rank-1.safetensors"):
        save_file({key("buffer", "running_mean", 0): torch.full((3,), 9.0)}, newest / "psi" / name)
    found, said = find(tmp_path)
    assert found == newest
    assert len(said) == 1 and "psi/rank-0 (copy).safetensors" in said[0] and "and 1 more left unread" in said[0]
    load(newest, {"psi": engine})
    assert engine.module.get_buffer("running_mean").tolist() == [0.0] * 3


@pytest.mark.parametrize("name", ["step-000030.bak", "step-000010 (copy)", "step-best", "step-30", "step-0000010"])
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_names_that_are_no_steps_are_left_alone(tmp_path: Path, name: str, kind: str):
    whole = save(tmp_path, 5)
    if kind == "file":
        (tmp_path / name).write_text("mine")
    else:
        shutil.copytree(whole, tmp_path / name)
    assert find(tmp_path) == (whole, [])
    newest = save(tmp_path, 10, keep_last=1)
    assert {path.name for path in tmp_path.iterdir()} == {name, newest.name}


def test_a_checkpoint_of_something_else_is_an_error_of_one_line(tmp_path: Path):
    folder = save(tmp_path, 5)
    with pytest.raises(UserError) as error:
        find(tmp_path, {**IDENTITY, "samples_per_step": 16})
    message = one_line(error)
    assert str(folder) in message and "samples_per_step is 8 there and 16 here" in message and "--run-dir" in message


def test_a_checkpoint_of_another_format_is_an_error_of_one_line(tmp_path: Path):
    folder = save(tmp_path, 5)
    rewrite(folder, lambda manifest: manifest.update(format=99))
    with pytest.raises(UserError) as error:
        find(tmp_path)
    assert "format 99" in one_line(error)


def test_a_checkpoint_of_another_network_is_an_error_of_one_line(tmp_path: Path):
    folder = save(tmp_path, 5)
    other = Untrained()
    other.module = nn.BatchNorm1d(4, affine=False)
    with pytest.raises(UserError) as error:
        load(folder, {"psi": other})
    assert "buffer of running_mean: 3 of 4 values" in one_line(error) and str(folder) in one_line(error)
    with pytest.raises(UserError, match="denoiser"):
        load(folder, {"denoiser": Untrained()})


def test_a_rank_that_goes_during_loading_is_no_fault_of_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def gone(*_: Any) -> None:
        raise RuntimeError("Read error [127.0.0.1]:45280: Connection reset by peer")

    monkeypatch.setattr(checkpoint, "restore", gone)
    with pytest.raises(RuntimeError, match="reset by peer"):
        load(save(tmp_path, 5), {"psi": Untrained()})


@pytest.fixture(scope="session", params=[1, 2], ids=["one rank", "two ranks"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank of checkpoint_worker.py found, by case; it saves in one launch and loads in another."""
    return launched(tmp_path_factory, request.param)


def launched(factory: pytest.TempPathFactory, world_size: int) -> list[dict[str, Any]]:
    return run_once(factory, "tests.support.checkpoint_worker", world_size, ("train", "resume"))


def identical(a: dict[str, dict[str, Tensor]], b: dict[str, dict[str, Tensor]]) -> bool:
    return a.keys() == b.keys() and all(
        a[player].keys() == b[player].keys()
        and all(torch.equal(a[player][name], b[player][name]) for name in a[player])
        for player in a
    )


@pytest.mark.slow
def test_loading_brings_back_both_players_and_the_average(ranks: list[dict[str, Any]]):
    for found in ranks:
        for case in cases_of(len(ranks)):
            queue = {"queue"} if case.config.game.queue else set()
            assert set(found[case.name]["at_save"]) == {"denoiser", "discriminator", "ema"} | queue
            assert identical(found[case.name]["resumed"]["loaded"], found[case.name]["at_save"]), case.name


@pytest.mark.slow
def test_a_resumed_run_ends_where_an_uninterrupted_one_does_bit_for_bit(ranks: list[dict[str, Any]]):
    for found in ranks:
        for case in cases_of(len(ranks)):
            whole = found[case.name]["at_end"]
            assert not identical(whole, found[case.name]["at_save"]), f"{case.name}: nothing was trained"
            assert identical(found[case.name]["resumed"]["at_end"], whole), case.name


@pytest.mark.slow
def test_ranks_that_find_different_checkpoints_or_data_do_not_start(ranks: list[dict[str, Any]]):
    for rank, found in enumerate(ranks):
        if len(ranks) == 1:
            assert found["disagreed"] == []
        else:
            none, older, data = found["disagreed"]
            assert "step 7 for one and none for another" in none and "same run folder" in none
            assert "step 7 for one and step 5 for another" in older
            assert f"data is '{('these', 'those')[rank]}' on rank {rank}" in data


@pytest.mark.slow
def test_a_rank_keeps_room_for_what_it_saves_only(ranks: list[dict[str, Any]]):
    for case in cases_of(len(ranks)):
        room = [found[case.name]["room"] for found in ranks]
        assert room[0] > 0
        # Without ZeRO rank 0 saves for all; with it the ranks share, and rank 0 has the buffers besides.
        assert all(other == 0 if case.stage == 0 else other > 0.4 * room[0] for other in room[1:]), case.name


@pytest.mark.slow
def test_another_number_of_ranks_at_another_stage_goes_on_from_it(tmp_path_factory: pytest.TempPathFactory):
    (one,) = launched(tmp_path_factory, 1)
    folder = folder_of_run(tmp_path_factory, "tests.support.checkpoint_worker", 1)
    with FileLock(f"{folder}-elsewhere.lock"):
        if not (folder / "elsewhere-1.pt").exists():
            run_ranks("tests.support.checkpoint_worker", 2, str(folder), "elsewhere")
    for rank in range(2):
        moved = torch.load(folder / f"elsewhere-{rank}.pt", weights_only=True)
        assert len(moved) == 5
        for name, found in moved.items():
            assert identical(found["loaded"], one[name]["at_save"]), name
            for player, weights in found["at_end"].items():
                for parameter, value in weights.items():
                    # as two divisions of one batch may differ in test_players.py
                    torch.testing.assert_close(value, one[name]["at_end"][player][parameter], rtol=0, atol=FP32_WEIGHTS)


@pytest.mark.slow
def test_no_file_of_a_checkpoint_can_run_code(tmp_path_factory: pytest.TempPathFactory):
    for name, outcomes in launched(tmp_path_factory, 1)[0]["trapped"].items():
        assert "ema.safetensors" in outcomes and ("queue.safetensors" in outcomes) == (name == "queue")
        assert any(path.startswith("denoiser/") for path in outcomes)
        for path, outcome in outcomes.items():
            assert outcome.startswith("UserError"), f"{name}: {path}: {outcome}"
