"""The loop with players that do not play."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from PIL import Image

from sadm_fast.config import check_config
from sadm_fast.console import Console
from sadm_fast.data import open_images
from sadm_fast.errors import UserError
from sadm_fast.ranks.stopping import StopRequest
from sadm_fast.run.folder import RunFolder
from sadm_fast.run.state import TrainState
from sadm_fast.trainer import Trainer, _note


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    """Of three steps, whose players `iterations` tells what to do."""
    (tmp_path / "images" / "only").mkdir(parents=True)
    for i in range(4):
        Image.fromarray(np.full((8, 8), 60 * i, np.uint8)).save(tmp_path / "images" / "only" / f"{i}.png")
    config = check_config({
        "name": "tiny",
        "data": {"path": str(tmp_path / "images"), "resolution": 8, "threads": 1, "loader": "torch"},
        "train": {"steps": 3, "micro_batch": 2, "log_every": 10},
    })  # fmt: skip
    monkeypatch.setattr("sadm_fast.trainer.write_report", lambda path: None)
    monkeypatch.setattr(Trainer, "_log_line", lambda *_: {"step": 0})
    monkeypatch.setattr("sadm_fast.trainer._note", lambda line: "")
    folder = RunFolder(tmp_path / "run")
    folder.claim(config)
    players: Any = MagicMock()
    players.process = config.process
    writer, gallery = MagicMock(), MagicMock()
    writer.status.return_value = False, False
    gallery.evaluates_after.return_value = False
    return Trainer(
        config, folder, open_images(tmp_path / "images"), players, MagicMock(), writer, gallery,
        num_classes=1, null_class=1, device=torch.device("cpu"), console=Console(),
    )  # fmt: skip


def test_a_line_tells_the_speed_in_flops_and_on_a_known_gpu_its_share_of_the_peak() -> None:
    line = {
        "loss_denoise": 0.5, "structure_distance": None, "structure_undefined": 0, "samples_per_s": 100.0,
        "flops_per_s": 2.5e13, "data_wait_fraction": 0.01,
    }  # fmt: skip
    assert _note(line | {"mfu": None}) == "loss 0.5 100 samples/s, 25 TFLOP/s a rank, data wait 1.0%"
    assert ", 4.86 GFLOP/s a rank, " in _note(line | {"mfu": None, "flops_per_s": 4.86e9})
    assert _note(line | {"mfu": 0.25}) == "loss 0.5 100 samples/s, 25 TFLOP/s a rank (25% MFU), data wait 1.0%"


def iterations(trainer: Trainer, *taken: bool) -> None:
    """Iterations that are taken or skipped, as the device tells when they are settled."""
    players: Any = trainer.players

    def launch(batches: object, step: int, meanwhile: Callable[[], None]) -> object:
        meanwhile()
        return MagicMock()

    players.launch.side_effect = launch
    players.settle.side_effect = taken


def test_a_run_in_which_every_step_was_skipped_is_an_error(trainer: Trainer) -> None:
    iterations(trainer, *[False] * 3)
    with pytest.raises(UserError, match=r"run: every step was skipped, .*: nothing was trained") as caught:
        trainer.run(StopRequest())
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="nothing was trained"):  # nor is it finished when it is started again
        trainer.run(StopRequest())


def test_a_continued_run_that_only_skipped_is_an_error(trainer: Trainer) -> None:
    trainer.state = TrainState(step=1, ema_updates=1)
    iterations(trainer, *[False] * 2)
    with pytest.raises(UserError, match="nothing was trained"):
        trainer.run(StopRequest())


def test_a_run_with_one_step_that_counted_is_none(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sadm_fast.trainer.Interval", MagicMock())
    iterations(trainer, False, True, False)
    assert trainer.run(StopRequest())
    assert (trainer.step, trainer.state.skipped_steps) == (3, 2)


def test_a_broken_image_is_named_once(trainer: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    loader = MagicMock(broken={"cat/3.png": "is an empty file; remove it"})
    trainer._note_broken(loader)
    loader.broken["cat/5.png"] = "is not an image"
    trainer._note_broken(loader)
    said = "broken image replaced by another: cat/3.png: is an empty file; remove it\n"
    assert capsys.readouterr().out == said + "broken image replaced by another: cat/5.png: is not an image\n"


def test_nothing_is_saved_while_steps_are_skipped(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that diverges after its seventh step: the checkpoint of the sixth is the last one that counts."""
    monkeypatch.setattr("sadm_fast.trainer.Interval", MagicMock())
    train = trainer.config.train.model_copy(update={"steps": 40, "checkpoint_every": 1})
    trainer.config = trainer.config.model_copy(update={"train": train})
    saved: list[int] = []

    def save(state: TrainState) -> None:
        saved.append(state.step)
        (trainer.folder.checkpoints / f"step-{state.step:06d}").mkdir()
        (trainer.folder.checkpoints / f"step-{state.step:06d}" / "COMPLETE").write_text("{}")

    writer: Any = trainer.writer
    writer.save.side_effect = save
    iterations(trainer, True, True, False, *[True] * 4, *[False] * 10)
    with pytest.raises(UserError, match=r"10 steps in a row, up to step 17, .* followed is .*step-000006: lower"):
        trainer.run(StopRequest())
    assert saved == [1, 2, 4, 5, 6, 7]
    assert [call.args[0] for call in writer.followed.call_args_list] == [1, 2, 4, 5, 6, 7]


def test_a_step_is_not_waited_for_before_the_next_one_is_on_its_way(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sadm_fast.trainer.Interval", MagicMock())
    iterations(trainer, True, False, True)
    order: list[str] = []
    players: Any = trainer.players
    launch, settle = players.launch.side_effect, iter([True, False, True])

    def launched(batches: object, step: int, meanwhile: Callable[[], None]) -> object:
        order.append(f"launch {step}")
        return launch(batches, step, meanwhile)

    def settled(outcome: object) -> bool:
        order.append("settle")
        return next(settle)

    players.launch.side_effect, players.settle.side_effect = launched, settled
    assert trainer.run(StopRequest())
    # The last step has something due: it is settled at once.
    assert order == ["launch 0", "launch 1", "settle", "launch 2", "settle", "settle"]
    assert (trainer.step, trainer.state.skipped_steps, trainer.state.ema_updates) == (3, 1, 2)


def test_what_is_made_after_a_step_is_made_of_a_settled_one(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sadm_fast.trainer.Interval", MagicMock())
    train = trainer.config.train.model_copy(update={"steps": 6, "checkpoint_every": 2})
    trainer.config = trainer.config.model_copy(update={"train": train})
    iterations(trainer, *[True] * 6)
    saved: list[tuple[int, int]] = []
    writer: Any = trainer.writer
    writer.save.side_effect = lambda state: saved.append((state.step, trainer.step))
    assert trainer.run(StopRequest())
    assert saved == [(2, 2), (4, 4), (6, 6)]


def test_an_evaluation_that_is_stopped_comes_after_the_save_and_is_made_up_for(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sadm_fast.trainer.Interval", MagicMock())
    request, order = StopRequest(), list[str]()
    writer: Any = trainer.writer
    gallery: Any = trainer.gallery
    writer.save.side_effect = lambda state: order.append(f"save {state.step}")
    writer.finish.side_effect = lambda: order.append("finish")
    gallery.evaluates_after.side_effect = lambda step: step == 3

    def evaluate(step: int, log: object, turn: Callable[[int], None]) -> None:
        turn(8)
        order.append(f"a batch of {step}")
        request._asked = True
        turn(16)
        order.append("more of it")

    gallery.evaluate.side_effect = evaluate
    iterations(trainer, *[True] * 3)
    assert not trainer.run(request), "the last step is taken, but the same command has something left to do"
    assert order == ["save 3", "finish", "a batch of 3", "finish"]
    gallery.evaluate.side_effect = lambda step, log, turn: order.append(f"all of {step}")
    assert trainer.run(StopRequest()) and order[4:] == ["all of 3", "finish"]
