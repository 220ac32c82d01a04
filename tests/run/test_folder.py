"""A run's folder: whose it is, and what is taken back when a run continues from an earlier step."""

import json
import os
from pathlib import Path

import pytest

from sadm_fast.config import Config, check_config
from sadm_fast.errors import UserError
from sadm_fast.files import LOCK, append_json, write_text
from sadm_fast.run.folder import RunFolder
from tests.test_files import held_by_another_process


def config(**changes: object) -> Config:
    return check_config({"name": "run", **changes})


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A folder that `config()` has claimed."""
    claimed = RunFolder(tmp_path / "run")
    claimed.claim(config())
    return claimed


def test_a_free_folder_is_claimed_by_writing_the_configuration(tmp_path: Path):
    free = RunFolder(tmp_path / "deep" / "run")
    assert free.check(config()) is False
    assert not free.path.parent.exists()
    free.claim(config())
    assert json.loads(free.config.read_text()) == config().resolved()
    assert free.check(config()) is True


def test_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/of/mine")
    assert RunFolder("~/runs/x").config == Path("/home/of/mine/runs/x/config.json")


def test_a_name_that_is_not_utf8_is_refused_before_training(tmp_path: Path):
    with pytest.raises(UserError, match=r"caf.*: the name is not UTF-8.*--run-dir"):
        RunFolder(tmp_path / os.fsdecode(b"caf\xe9")).check(config())


def test_what_a_resumed_run_may_change_is_no_other_configuration(folder: RunFolder):
    longer = config(train={"steps": 9999, "log_every": 3}, data={"path": "elsewhere"}, sampling={"steps": 5})
    assert folder.check(longer) is True


def with_a_checkpoint(folder: RunFolder) -> RunFolder:
    (folder.checkpoints / "step-000005").mkdir()
    (folder.checkpoints / "step-000005" / "COMPLETE").write_text("{}")
    return folder


def test_differences_are_named_with_both_values(folder: RunFolder):
    with_a_checkpoint(folder)
    with pytest.raises(UserError, match="seed: 0 there, 1 here"):
        folder.check(config(seed=1))
    with pytest.raises(UserError, match="and 1 more"):
        folder.check(config(seed=1, train={"precision": "bf16"}, game={"lambda_s": 0.9}))


def test_rewinding_forgets_later_steps_and_torn_lines(folder: RunFolder):
    for step in (10, 20, 30):
        append_json(folder.metrics, {"step": step})
        append_json(folder.evaluations, {"step": step})
        for path in (folder.samples / f"step-{step:06d}.png", folder.samples / f"step-{step:06d}-ema.png"):
            path.touch()
        (folder.relations / f"step-{step:06d}.npz").touch()
    (folder.samples / "real.png").touch()
    with folder.metrics.open("a") as file:
        file.write('{"step": 3')
    folder.rewind(20, print)
    for path in (folder.metrics, folder.evaluations):
        assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [10, 20]
    assert sorted(path.name for path in folder.samples.iterdir()) == [
        "real.png", "step-000010-ema.png", "step-000010.png", "step-000020-ema.png", "step-000020.png",
    ]  # fmt: skip
    assert sorted(path.name for path in folder.relations.iterdir()) == ["step-000010.npz", "step-000020.npz"]


def test_numbers_that_are_not_finite_are_null_in_json(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    append_json(path, {"step": 1, "norm": float("inf"), "floor": {"fid": float("nan"), "other": 2.0}})
    assert path.read_text() == '{"step": 1, "norm": null, "floor": {"fid": null, "other": 2.0}}\n'


def test_a_file_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "run.json"
    write_text(path, "old")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        write_text(path, "new")
    assert path.read_text() == "old"


def test_a_folder_without_a_checkpoint_takes_another_configuration(folder: RunFolder):
    with folder.held(config(seed=1), print):
        assert json.loads(folder.config.read_text())["seed"] == 1
    with_a_checkpoint(folder)
    with pytest.raises(UserError, match="seed: 1 there, 2 here"), folder.held(config(seed=2), print):
        pass
    assert json.loads(folder.config.read_text())["seed"] == 1


def test_a_start_that_was_killed_leaves_a_free_folder(tmp_path: Path):
    killed = RunFolder(tmp_path)
    for name in (LOCK, "config.json.tmp"):
        (tmp_path / name).write_text("")
    assert killed.check(config()) is False


def test_a_run_keeps_others_out_of_its_folder(tmp_path: Path):
    folder = RunFolder(tmp_path / "run")
    folder.claim(config())
    with held_by_another_process(folder.path), pytest.raises(UserError) as caught, folder.held(config(), print):
        pass
    assert "run: process " in str(caught.value) and "is training into it; wait for its end" in str(caught.value)
    with folder.held(config(), print):
        pass
    assert not (folder.path / LOCK).exists()


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "evaluations.jsonl", "broken.jsonl", "report.html"])
def test_a_folder_where_a_file_belongs_is_named_before_a_run_starts(folder: RunFolder, name: str):
    (folder.path / name).mkdir()
    with pytest.raises(UserError, match=f"{name} is a folder, and a run needs a file there; move it away"):
        folder.check(config())


@pytest.mark.parametrize("name", ["tensorboard", "samples", "relations", "pretrained", "checkpoints"])
def test_a_file_where_a_folder_belongs_is_named_before_a_run_starts(folder: RunFolder, name: str):
    if (folder.path / name).is_dir():
        (folder.path / name).rmdir()
    (folder.path / name).write_text("mine")
    with pytest.raises(UserError, match=f"{name} is a file, and a run needs a folder there; move it away"):
        folder.check(config())


@pytest.mark.parametrize("content", [b"{", 100_000 * b"[", 300 * b'{"a":' + b"1" + 300 * b"}", b"\xff\xfe{}"])
def test_a_config_json_that_cannot_be_read_is_one_line(folder: RunFolder, content: bytes):
    folder.config.write_bytes(content)
    with pytest.raises(UserError, match="config.json: cannot be read") as caught:
        folder.check(config())
    assert "\n" not in str(caught.value)


def test_rewinding_leaves_names_alone_that_are_not_its_own(folder: RunFolder):
    strangers = ["step-best.png", "step-000030 (copy).png", "step-30.png", "step-000030.png.bak", "notes.txt"]
    for name in strangers:
        (folder.samples / name).touch()
    (folder.relations / "step-x.npz").touch()
    (folder.samples / "step-000099.png").mkdir()
    folder.rewind(20, print)
    assert sorted(path.name for path in folder.samples.iterdir()) == sorted([*strangers, "step-000099.png"])
    assert [path.name for path in folder.relations.iterdir()] == ["step-x.npz"]


def test_lines_that_cannot_be_read_are_counted_and_left_out(folder: RunFolder):
    said: list[str] = []
    good, deep = b'{"step": 1}\n', 100_000 * b"[" + b"\n"
    folder.metrics.write_bytes(good + b'{"step": 2, "note": "\xff"}\n' + deep + b"[1]\n7\n" + b'{"step": 3, "lo')
    folder.rewind(20, said.append)
    assert folder.metrics.read_bytes() == good
    assert said == [f"{folder.metrics}: 4 line(s) that cannot be read are left out"]


def test_a_changed_learning_rate_is_told_and_kept(folder: RunFolder):
    said: list[str] = []
    with_a_checkpoint(folder)
    with folder.held(config(denoiser_optimizer={"lr": 0.5}), said.append):
        pass
    assert said == ["denoiser_optimizer.lr: 0.0001 so far, 0.5 from here on"]
    assert json.loads(folder.config.read_text())["denoiser_optimizer"]["lr"] == 0.5
