"""Checkpoints that are whole or do not exist, run no code, and continue a run bit for bit."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sadm_fast import checkpoint
from sadm_fast.errors import UserError
from tests.checkpoint_worker import CASES, Trap
from tests.ranks import run_once

IDENTITY = {"configuration": "abc", "world_size": 1}


def save(checkpoints: Path, step: int, keep_last: int = 5, value: float = 0.0) -> Path:
    """A checkpoint without engines."""
    ema = {"weight": torch.full((3, 2), value)}
    return checkpoint.save(checkpoints, step, {}, ema, {"step": step}, IDENTITY, keep_last)


def find(checkpoints: Path, identity: dict[str, Any] | None = None) -> tuple[Path | None, list[str]]:
    """The chosen checkpoint and what was said about others."""
    said: list[str] = []
    return checkpoint.find(checkpoints, IDENTITY if identity is None else identity, said.append), said


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_saved_checkpoint_is_found_and_loaded(tmp_path: Path):
    save(tmp_path, 5, value=1.0)
    newest = save(tmp_path, 10, value=2.0)
    assert find(tmp_path) == (newest, [])
    ema, state = checkpoint.load(newest, {})
    assert torch.equal(ema["weight"], torch.full((3, 2), 2.0))
    assert state == {"step": 10}
    manifest = json.loads((newest / "COMPLETE").read_text())
    assert manifest["step"] == 10 and manifest["configuration"] == "abc"
    assert sorted(manifest["files"]) == ["ema.safetensors", "rank-0.pt"]


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


@pytest.mark.parametrize("where", ["save_file", "torch.save", "_sync", "_sha256", "Path.rename", "write_json"])
def test_a_kill_at_any_write_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str):
    whole = save(tmp_path, 5, keep_last=1)

    class Killed(BaseException):
        pass

    def kill(*_: object, **__: object) -> None:
        raise Killed

    targets: dict[str, tuple[Any, str]] = {
        "torch.save": (torch, "save"),
        "Path.rename": (Path, "rename"),
    }
    with monkeypatch.context() as patched:
        patched.setattr(*targets.get(where, (checkpoint, where)), kill)
        with pytest.raises(Killed):
            save(tmp_path, 10, keep_last=1)
    assert find(tmp_path) == (whole, [])
    # What was left behind is in nobody's way.
    again = save(tmp_path, 10, keep_last=1)
    assert find(tmp_path) == (again, [])
    assert [path.name for path in tmp_path.iterdir()] == [again.name]


def test_a_kill_while_old_checkpoints_are_deleted_leaves_no_half_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save(tmp_path, 5)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.shutil, "rmtree", lambda path, ignore_errors=False: None)
        newest = save(tmp_path, 10, keep_last=1)
    assert (tmp_path / "step-000005").exists()
    assert checkpoint.completed(tmp_path) == [newest]


def test_only_the_last_ones_are_kept(tmp_path: Path):
    for step in (5, 10, 15, 20):
        save(tmp_path, step, keep_last=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000015", "step-000020"]


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


Damage = Callable[[Path], None]


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda folder: flip_a_bit(folder / "ema.safetensors"), "ema.safetensors does not match its hash"),
        (lambda folder: (folder / "rank-0.pt").unlink(), "rank-0.pt is missing"),
        (lambda folder: (folder / "rank-0.pt").write_bytes(b""), "rank-0.pt does not match its hash"),
        (lambda folder: (folder / "COMPLETE").write_text("{"), "COMPLETE cannot be read"),
        (lambda folder: (folder / "COMPLETE").write_text("[]"), "COMPLETE cannot be read"),
    ],
)
def test_damage_is_named_and_the_checkpoint_before_is_used(tmp_path: Path, damage: Damage, named: str):
    whole, newest = save(tmp_path, 5), save(tmp_path, 10)
    damage(newest)
    found, said = find(tmp_path)
    assert found == whole
    assert len(said) == 1 and named in said[0] and str(newest) in said[0]


def test_a_checkpoint_of_something_else_is_an_error_of_one_line(tmp_path: Path):
    folder = save(tmp_path, 5)
    with pytest.raises(UserError) as error:
        find(tmp_path, {**IDENTITY, "world_size": 2})
    message = one_line(error)
    assert str(folder) in message and "world_size is 1 there and 2 here" in message and "--run-dir" in message


def test_a_checkpoint_of_another_format_is_an_error_of_one_line(tmp_path: Path):
    folder = save(tmp_path, 5)
    manifest = json.loads((folder / "COMPLETE").read_text())
    (folder / "COMPLETE").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(UserError) as error:
        find(tmp_path)
    assert "format 99" in one_line(error)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path):
    folder = save(tmp_path, 5)
    torch.save({"step": Trap(tmp_path / "sprung")}, folder / "rank-0.pt")
    with pytest.raises(UserError) as error:
        checkpoint.load(folder, {})
    assert str(folder) in one_line(error)
    assert not (tmp_path / "sprung").exists()
    # The trap is a real one.
    torch.load(folder / "rank-0.pt", weights_only=False)
    assert os.path.isdir(tmp_path / "sprung")


def test_a_checkpoint_that_other_code_wrote_is_an_error_of_one_line(tmp_path: Path):
    folder = save(tmp_path, 5)

    class OtherEngine:
        def load_checkpoint(self, *_: object, **__: object) -> None:
            raise RuntimeError("Error(s) in loading state_dict for DiT:\n\tsize mismatch for pos_embed")

    with pytest.raises(UserError) as error:
        checkpoint.load(folder, {"denoiser": OtherEngine()})
    assert "size mismatch for pos_embed" in one_line(error)


@pytest.fixture(scope="session", params=[1, 2], ids=["one rank", "two ranks"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank of checkpoint_worker.py found, by case; it saves in one launch and loads in another."""
    return launched(tmp_path_factory, request.param)


def launched(factory: pytest.TempPathFactory, world_size: int) -> list[dict[str, Any]]:
    return run_once(factory, "tests.checkpoint_worker", world_size, ("train", "resume"))


def identical(a: dict[str, dict[str, Tensor]], b: dict[str, dict[str, Tensor]]) -> bool:
    return a.keys() == b.keys() and all(
        a[player].keys() == b[player].keys()
        and all(torch.equal(a[player][name], b[player][name]) for name in a[player])
        for player in a
    )


@pytest.mark.slow
def test_loading_brings_back_both_players_and_the_average(ranks: list[dict[str, Any]]):
    for rank, found in enumerate(ranks):
        for case in CASES:
            assert set(found[case.name]["at_save"]) == {"denoiser", "discriminator", "ema"}
            assert identical(found[case.name]["resumed"]["loaded"], found[case.name]["at_save"]), case.name
            assert found[case.name]["resumed"]["rank"] == rank


@pytest.mark.slow
def test_a_resumed_run_ends_where_an_uninterrupted_one_does_bit_for_bit(ranks: list[dict[str, Any]]):
    for found in ranks:
        for case in CASES:
            whole = found[case.name]["at_end"]
            assert not identical(whole, found[case.name]["at_save"]), f"{case.name}: nothing was trained"
            assert identical(found[case.name]["resumed"]["at_end"], whole), case.name


@pytest.mark.slow
def test_no_file_of_a_checkpoint_can_run_code(tmp_path_factory: pytest.TempPathFactory):
    for name, outcomes in launched(tmp_path_factory, 1)[0]["trapped"].items():
        assert {"ema.safetensors", "rank-0.pt"} < set(outcomes)
        assert any(path.startswith("denoiser/") for path in outcomes)
        for path, outcome in outcomes.items():
            assert outcome.startswith("UserError"), f"{name}: {path}: {outcome}"
