"""What a start finds out before anything is trained."""

import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sadm_fast import start_checks
from sadm_fast.config import Config, check_config
from sadm_fast.data.source import Source
from sadm_fast.errors import UserError
from sadm_fast.planning.cost import meta_models
from sadm_fast.planning.players import players
from sadm_fast.planning.storage import checkpoint_bytes, checkpoints_at_once, snapshot_bytes
from sadm_fast.run.folder import RunFolder
from sadm_fast.start_checks import check_memory, check_start

SMALL: dict[str, Any] = {
    "name": "small",
    "denoiser": {"hidden_size": 16, "depth": 1, "num_heads": 2},
    "structure_encoder": {"width": 8, "feature_dim": 8},
}


def config(**blocks: Any) -> Config:
    return check_config(SMALL | blocks)


class Labels(Source):
    """Samples of which only the labels are asked for."""

    where = "numbers"

    def __init__(self, labels: list[int]) -> None:
        self.labels = np.array(labels, dtype=np.int64)
        self.classes = tuple(map(str, range(1 + max(labels))))

    def name(self, index: int) -> str:
        return str(index)

    def fingerprint(self) -> str:
        return "labels"

    def subset(self, indices: np.ndarray) -> "Labels":
        return Labels(self.labels[indices].tolist())


ENOUGH = Labels([0] * 20 + [1] * 20)


def refusal(config: Config, folder: Path, source: Source = ENOUGH, world_size: int = 1) -> str:
    with pytest.raises(UserError) as caught:
        check_start(config, source, 10, RunFolder(folder), world_size)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_run_that_can_start_passes_and_nothing_is_written(tmp_path: Path) -> None:
    check_start(config(evaluate={"every": 5}), ENOUGH, 10, RunFolder(tmp_path / "run"), 1)
    assert not list(tmp_path.iterdir())


def test_both_weights_files_are_opened(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"mine": torch.ones(3)}, path)
    denoiser = config(denoiser=SMALL["denoiser"] | {"weights": str(path)})
    assert refusal(denoiser, tmp_path / "run").startswith(f"denoiser.weights={path}: does not fit")
    psi = config(structure_encoder=SMALL["structure_encoder"] | {"weights": str(path)})
    assert refusal(psi, tmp_path / "run").startswith(f"structure_encoder.weights={path}: does not fit SmallCNN")
    check_start(psi.model_copy(update={"game": config(game={"mode": "plain"}).game}), ENOUGH, 10, RunFolder(path), 1)


@pytest.mark.parametrize(
    "labels", [[0] * 20, [1] * 20, [0, 1, 2]], ids=["one class", "an empty class", "one image each"]
)
def test_psi_and_the_judge_need_images_of_two_classes(tmp_path: Path, labels: list[int]) -> None:
    message = refusal(config(), tmp_path, Labels(labels))
    assert message.startswith("structure_encoder.weights=null: Psi is trained ")
    assert message.endswith(
        "give the weights of an encoder trained elsewhere (docs/data.md), leave Psi untrained"
        " (structure_encoder.pretrain.steps=0), or use game.mode=plain"
    )
    message = refusal(config(game={"mode": "plain"}, evaluate={"every": 5}), tmp_path, Labels(labels))
    assert message.startswith("evaluate.every=5: its judge is trained ")
    assert message.endswith('use evaluate.judges=["random", "pixels"], or evaluate.every=null')
    if len(set(labels)) == 1:  # judges that need no classes do without
        judged = config(game={"mode": "plain"}, evaluate={"every": 5, "judges": ["random", "pixels"]})
        check_start(judged, Labels(labels), 10, RunFolder(tmp_path / "run"), 1)
    check_start(config(game={"mode": "plain"}), Labels(labels), 10, RunFolder(tmp_path), 1)
    untrained = config(structure_encoder=SMALL["structure_encoder"] | {"pretrain": {"steps": 0}})
    check_start(untrained, Labels(labels), 10, RunFolder(tmp_path), 1)


def test_too_few_images_to_hold_out_are_counted(tmp_path: Path) -> None:
    assert "numbers: 3 images in 3 classes are too few to hold out 0.1 of each class" in refusal(
        config(), tmp_path, Labels([0, 1, 2])
    )


@pytest.mark.parametrize("name", ["structure_encoder.safetensors", "judge.safetensors"])
def test_a_file_in_the_way_of_what_is_trained_first_is_found(tmp_path: Path, name: str) -> None:
    path = tmp_path / "pretrained" / name
    path.parent.mkdir()
    save_file({"mine": torch.ones(3)}, path)
    message = refusal(config(evaluate={"every": 5}), tmp_path)
    assert message == f"{path}: exists but was not written by this program; move it away"


def test_optimizers_and_the_queue_are_checked(tmp_path: Path) -> None:
    apex = config(denoiser_optimizer={"type": "apex_fused_adam"})
    assert refusal(apex, tmp_path).startswith("denoiser_optimizer.type=apex_fused_adam: ")
    queue = config(game={"queue": 128})
    assert refusal(queue, tmp_path, world_size=2).startswith("game.queue=128: must be 0, or at least the 256 samples")


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_a_disk_that_is_too_small_for_the_checkpoints_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = config(train={"steps": 1000, "checkpoint_every": 100, "keep_last": 2})
    denoiser, psi = meta_models(asked, 10)
    one = checkpoint_bytes(asked, players(asked, denoiser, psi), 8)
    for missing, there in ((3, 0), (2, 1), (1, 3)):
        for step in range(there):
            (tmp_path / f"checkpoints/step-{100 + 100 * step:06d}").mkdir(parents=True, exist_ok=True)
            (tmp_path / f"checkpoints/step-{100 + 100 * step:06d}/COMPLETE").touch()
        monkeypatch.setattr(shutil, "disk_usage", lambda path, n=missing: Usage(0, 0, n * one))
        assert f"GB for {missing} checkpoints (train.keep_last" in refusal(asked, tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, n=missing: Usage(0, 0, n * one + 2**21))
        check_start(asked, ENOUGH, 10, RunFolder(tmp_path), 1)


def test_a_checkpoint_of_difffits_holds_what_is_trained() -> None:
    asked = config(denoiser={"train": "difffit", "weights": "x"}, game={"mode": "plain"})
    denoiser, _ = meta_models(asked, 10)
    trained = sum(p.numel() for p in denoiser.parameters() if p.requires_grad)
    # Masters, both moments, the average: fp32.
    assert checkpoint_bytes(asked, players(asked, denoiser, None), 8) == 4 * 4 * trained


def test_averages_that_stay_count_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    averages = {"more_ema": [{"profile": "power", "std": 0.05}, {"profile": "constant"}], "ema_snapshot_every": 100}
    asked = config(train={"steps": 1000, "checkpoint_every": 100, **averages})
    both = players(asked, *meta_models(asked, 10))
    whole = 4 * both[0].everything
    assert snapshot_bytes(asked, both) == 2 * whole
    alone = checkpoint_bytes(config(), both, 8)
    assert checkpoint_bytes(asked, both, 8) == alone + 2 * whole
    (tmp_path / "snapshots/power-0.1").mkdir(parents=True)
    (tmp_path / "snapshots/power-0.1/step-000100.safetensors").touch()
    needed = 3 * (alone + 2 * whole) + 9 * 2 * whole
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, needed))
    assert "3 checkpoints (train.keep_last, train.keep_every) and the averages of 9 steps" in refusal(asked, tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, needed + 2**20))
    check_start(asked, ENOUGH, 10, RunFolder(tmp_path), 1)


@pytest.mark.parametrize(
    ("train", "count"),
    [
        ({"steps": 10, "checkpoint_every": 100}, 1),
        ({"steps": 100, "checkpoint_every": 50}, 2),
        ({"steps": 1000, "checkpoint_every": 50}, 3),
        ({"steps": 1000, "checkpoint_every": 50, "keep_last": 5}, 6),
        ({"steps": 1000, "checkpoint_every": 50, "keep_every": 75}, 3 + 6),
        ({"steps": 1000, "checkpoint_every": 50, "keep_every": 50}, 20),
    ],
)
def test_checkpoints_on_the_disk_at_once_are_those_kept_and_one_more(train: dict[str, int], count: int) -> None:
    assert checkpoints_at_once(config(train=train)) == count


def test_a_run_that_needs_more_memory_than_there_is_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    check_memory(config(), 10, 1, cpu, 1)
    with pytest.raises(UserError, match=r"^train.micro_batch=65536: the run needs [\d,.]+ GiB, and this machine has "):
        check_memory(config(train={"micro_batch": 65536}, data={"resolution": 256}), 10, 1, cpu, 1)
    with pytest.raises(UserError, match=r"^train.micro_batch=128: .* this machine has 0.0 GiB"):
        monkeypatch.setattr(start_checks, "_installed", lambda: 2**20)
        check_memory(config(), 10, 1, cpu, 1)


def test_ranks_of_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    needed: list[int] = []
    monkeypatch.setattr(start_checks, "_require", lambda size, *_: needed.append(size))
    for ranks_here in (1, 4):
        check_memory(config(), 10, 4, torch.device("cpu"), ranks_here)
    assert needed[1] == 4 * needed[0] > 0


def test_the_memory_of_this_machine_is_found() -> None:
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0.9 * physical < start_checks._installed()


@pytest.mark.parametrize("blocks", [{}, {"game": {"mode": "plain"}, "evaluate": {"every": 1}}], ids=["Psi", "judge"])
def test_classes_without_images_are_none_to_tell_apart(tmp_path: Path, blocks: dict[str, Any]) -> None:
    message = refusal(config(**blocks), tmp_path / "run", Labels([5] * 40))  # as shards number it: 0 to 5
    assert "is trained to tell classes apart, and data.path=numbers has images of only one" in message


@pytest.mark.parametrize(
    ("evaluate", "words"),
    [
        ({"judges": ["alexnet"]}, "evaluate.judges=alexnet: must be one of classifier, random, pixels, inception"),
        ({"judges": ["pixels=a.pt"]}, "evaluate.judges=pixels=a.pt: must be one of "),
        ({"judges": ["inception"]}, "evaluate.judges=inception: needs pt_inception-2015-12-05-6726825d.pth"),
        ({"judges": ["vit=nowhere.pt"]}, "evaluate.judges=vit=nowhere.pt: there is no such file"),
    ],
)
def test_judges_that_cannot_be_had_are_named_before_the_training(
    tmp_path: Path, evaluate: dict[str, Any], words: str
) -> None:
    assert words in refusal(config(game={"mode": "plain"}, evaluate={"every": 5, **evaluate}), tmp_path)
