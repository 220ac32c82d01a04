"""Pretraining and its cache. As a module that is run, this file is a rank of the two-process tests."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sadm_fast import pretrain
from sadm_fast.build import build_psi
from sadm_fast.classifier import accuracy, train_classifier
from sadm_fast.config import check_config
from sadm_fast.console import Console
from sadm_fast.data.batch import ImageBatch
from sadm_fast.data.samples import Arrays
from sadm_fast.data.source import Source
from sadm_fast.errors import UserError
from sadm_fast.metrics.judges import ClassifierJudge
from sadm_fast.pretrain import psi_after_the_game
from sadm_fast.train_once import load_or_train
from tests.support.ranks import run_ranks

CLASSES = 4


def toy_images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Class k has a bright quadrant k under noise as strong: float32 [count, 1, 16, 16], int64 [count]."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    images = torch.randn(count, 1, 16, 16, generator=generator) * 0.5 - 0.5
    for i, label in enumerate(labels.tolist()):
        top, left = 8 * (label // 2), 8 * (label % 2)
        images[i, :, top : top + 8, left : left + 8] += 0.5
    return images.clamp(-1.0, 1.0), labels


def toy_batches(size: int, seed: int = 0) -> Iterator[ImageBatch]:
    images, labels = toy_images(256, seed)
    order = torch.Generator().manual_seed(seed)
    while True:
        ids = torch.randint(0, 256, (size,), generator=order)
        yield ImageBatch(images[ids], labels[ids], ids)


def small_network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 8, 5, stride=4, padding=2), nn.ReLU(), nn.Flatten(), nn.Linear(128, 16))


def train_small(seed: int, network: nn.Module | None = None, **changes: Any) -> tuple[nn.Module, nn.Linear]:
    network = network or small_network(seed)
    options: dict[str, Any] = {"steps": 60, "lr": 3e-3, "weight_decay": 0.01, "seed": seed, "device": "cpu"}
    head = train_classifier(network, 16, CLASSES, toy_batches(32), **{**options, **changes})
    return network, head


def test_learns_a_toy_problem():
    network, head = train_small(seed=0)
    assert head.weight.shape == (CLASSES, 16)
    assert accuracy(network, head, *toy_images(200, seed=99)) > 0.95
    assert not network.training
    assert not head.training


def test_the_judge_learns_a_toy_problem_and_keeps_it_in_eval_mode():
    torch.manual_seed(0)
    judge = ClassifierJudge(1, width=16, depth=1)
    head = train_classifier(
        judge, 16, CLASSES, toy_batches(32), steps=120, lr=0.01, weight_decay=0.05, seed=0, device="cpu"
    )
    # Its global mean tells quadrants apart only by what the border does: well above the chance of 0.25.
    assert accuracy(judge, head, *toy_images(200, seed=99)) > 0.6


def test_the_same_seed_gives_the_same_weights_bit_for_bit():
    first, again, other = (train_small(seed=seed, network=small_network(0), steps=10) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first[0].parameters(), again[0].parameters(), strict=True))
    assert torch.equal(first[1].weight, again[1].weight)
    assert not torch.equal(first[1].weight, other[1].weight)


def test_no_gradient_is_left_for_the_next_to_train_the_weights():
    network, head = train_small(seed=0, steps=2)
    assert all(p.grad is None for module in (network, head) for p in module.parameters())


def test_frozen_parameters_stay():
    network = small_network(0)
    first_layer = network.get_submodule("0").requires_grad_(False)
    before = [p.clone() for p in first_layer.parameters()]
    train_small(seed=0, network=network, steps=3)
    assert all(torch.equal(a, b) for a, b in zip(before, first_layer.parameters(), strict=True))


def test_progress_is_told_and_ends_at_the_last_step():
    calls: list[tuple[int, int, float]] = []
    train_small(seed=0, steps=125, progress=lambda *call: calls.append(call))
    assert [step for step, _, _ in calls] == sorted({step for step, _, _ in calls})
    assert calls[-1][:2] == (125, 125)
    assert 25 < len(calls) < 100
    assert calls[-1][2] < 0.5 * calls[0][2]


def test_batches_that_end_early_are_an_error():
    batches = [batch for batch, _ in zip(toy_batches(8), range(3), strict=False)]
    with pytest.raises(ValueError, match="ended after 3 of 5 steps"):
        train_classifier(
            small_network(0), 16, CLASSES, batches, steps=5, lr=1e-3, weight_decay=0.0, seed=0, device="cpu"
        )


def test_divergence_is_a_clear_error():
    with pytest.raises(UserError, match=r"diverged at step \d+: loss .*lr=1e\+30"):
        train_small(seed=0, lr=1e30)


def test_accuracy_counts_right_answers_and_restores_the_mode():
    head = nn.Linear(4, 4, bias=False)
    head.weight.data = torch.eye(4)
    network = nn.Flatten().train()
    images = torch.eye(4)[[0, 1, 2, 3, 0]].view(5, 4, 1, 1)
    assert accuracy(network, head, images, torch.tensor([0, 1, 2, 0, 1]), batch=2) == pytest.approx(0.6)
    assert network.training
    with pytest.raises(ValueError, match="no images"):
        accuracy(network, head, images[:0], torch.zeros(0, dtype=torch.int64))


@pytest.mark.parametrize("seed", [0, 2**63, 2**64 - 7920, 2**64 - 7919, 2**64 - 1])
def test_the_judge_has_a_seed_of_its_own_whatever_the_runs_is(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    config = check_config({"name": "seeds", "seed": seed})
    monkeypatch.setattr(pretrain, "load_or_train", lambda path, build, *_: (build(), {"cached": True}))
    images: Any = SimpleNamespace(fingerprint=lambda: "none")
    judge, _ = pretrain.prepare_judge(config, images, Path(), torch.device("cpu"), Console(rank=1))
    torch.manual_seed(seed)
    assert not torch.equal(next(judge.parameters()), next(ClassifierJudge(1).parameters()))


def psi_of(tmp_path: Path, source: Source, **pretrain_fields: Any) -> tuple[nn.Module, dict[str, Any]]:
    """Psi of a run on `source`, trained as `pretrain_fields` say, kept in tmp_path."""
    blocks: dict[str, Any] = {
        "data": {"source": "own", "resolution": 16},
        "structure_encoder": {"width": 8, "feature_dim": 8, "pretrain": {"batch": 16, **pretrain_fields}},
    }
    config = check_config({"name": "wrong", **blocks})
    return pretrain.prepare_psi(config, source, tmp_path, torch.device("cpu"), Console(rank=1))


def toy_source(count: int = 80) -> Arrays:
    images, labels = toy_images(count, seed=3)
    return Arrays(images, labels)


@pytest.mark.parametrize(
    ("game", "loaded", "stage"),
    [
        ({"mode": "sadm"}, 1, None),
        ({"mode": "sadm", "compare": "tokens", "stage": 1}, 1, 1),
        ({"mode": "structure"}, 0, None),
        ({"mode": "plain"}, None, None),
        ({"mode": "structure", "look_at": "hidden"}, None, None),
    ],
)
def test_psi_after_the_game_is_the_discriminator_of_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, game: dict[str, Any], loaded: int | None, stage: int | None
) -> None:
    found: list[tuple[Path, str]] = []
    monkeypatch.setattr(pretrain, "load_player", lambda folder, player, network: found.append((folder, player)))
    config = check_config({"name": "tiny", "game": game, "structure_encoder": {"pretrain": {"steps": 0}}})
    checkpoint = tmp_path / "step-000005"
    psi = psi_after_the_game(config, toy_source(), tmp_path, checkpoint, torch.device("cpu"), Console())
    if loaded is None:
        assert psi is None and not found
    else:
        assert psi is not None and not psi.training and psi.map_stage == stage
        assert found == [(checkpoint, "discriminator")] * loaded


def test_psi_that_is_not_trained_keeps_its_first_weights(tmp_path: Path):
    psi, facts = psi_of(tmp_path, toy_source(), steps=0)
    first = build_psi(check_config({"name": "x", "structure_encoder": {"width": 8, "feature_dim": 8}}))
    assert all(torch.equal(a, b) for a, b in zip(psi.parameters(), first.parameters(), strict=True))
    assert not psi.training and facts == {"steps": 0, "accuracy": None, "cached": False}
    trained, facts = psi_of(tmp_path, toy_source(), steps=2)
    assert not torch.equal(next(trained.parameters()), next(psi.parameters())) and not facts["cached"]
    with pytest.raises(UserError, match="labels=shuffled: steps=0 learns no labels"):
        psi_of(tmp_path, toy_source(), steps=0, labels="shuffled")


@pytest.mark.parametrize("labels", ["own", "shuffled"])
def test_psi_learns_shuffled_labels_where_it_shall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labels: str):
    source, seen = toy_source(), list[tuple[bytes, int]]()

    def watch(module: nn.Module, dim: int, classes: int, batches: Iterator[ImageBatch], **_: Any) -> nn.Linear:
        for batch, _step in zip(batches, range(12), strict=False):  # more than two epochs of at most 80 images
            seen.extend((x.numpy().tobytes(), int(y)) for x, y in zip(batch.images, batch.labels, strict=True))
        return nn.Linear(dim, classes)

    monkeypatch.setattr(pretrain, "train_classifier", watch)
    _, facts = psi_of(tmp_path, source, steps=12, labels=labels)
    learned = dict(seen)
    assert all(learned[image] == label for image, label in seen), "an image has one label all along"
    images = source.read(np.arange(len(source)), np.zeros(len(source), dtype=bool))
    true = {image.tobytes(): label for image, label in zip(images, source.labels.tolist(), strict=True)}
    own = [true[image] for image in learned]
    assert np.bincount(list(learned.values())).tolist() == np.bincount(own).tolist(), "classes keep their sizes"
    assert facts.get("labels") == (None if labels == "own" else "shuffled")
    right = np.mean([true[image] == label for image, label in learned.items()])
    assert right == 1 if labels == "own" else right < 0.5


class Training:
    """A stand-in for training that counts its calls."""

    def __init__(self, result: float = 0.9) -> None:
        self.calls = 0
        self.result = result

    def __call__(self, module: nn.Module) -> dict[str, Any]:
        self.calls += 1
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.fill_(self.result)
        return {"accuracy": self.result}


def cached(path: Path, train: Training, fingerprint: str = "small, seed 0") -> tuple[nn.Module, dict[str, Any]]:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))

    return load_or_train(path, build, train, fingerprint)


def test_a_second_call_loads_what_the_first_one_trained(tmp_path: Path):
    path, train = tmp_path / "new" / "psi.safetensors", Training()
    first, info = cached(path, train)
    again, info_again = cached(path, train)
    assert train.calls == 1
    assert info == {"accuracy": 0.9, "cached": False}
    assert info_again == {"accuracy": 0.9, "cached": True}
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))
    assert not again.training
    assert [p.name for p in path.parent.iterdir()] == ["psi.safetensors"]


def test_another_fingerprint_trains_again_and_replaces(tmp_path: Path):
    path = tmp_path / "psi.safetensors"
    cached(path, Training(0.1))
    _, info = cached(path, Training(0.2), fingerprint="small, seed 1")
    assert info == {"accuracy": 0.2, "cached": False}
    _, info = cached(path, Training(0.3), fingerprint="small, seed 1")
    assert info == {"accuracy": 0.2, "cached": True}


@pytest.mark.parametrize("damage", ["empty", "cut", "weight", "pickle"])
def test_a_damaged_file_means_training_again(tmp_path: Path, damage: str):
    path = tmp_path / "psi.safetensors"
    cached(path, Training(0.1))
    data = path.read_bytes()
    torch.save({"weights": Escape(tmp_path / "escaped")}, tmp_path / "pickle")
    damaged = {
        "empty": b"",
        "cut": data[:-4],
        "weight": data[:-1] + bytes([data[-1] ^ 1]),
        "pickle": (tmp_path / "pickle").read_bytes(),
    }
    path.write_bytes(damaged[damage])
    module, info = cached(path, Training(0.2))
    assert info == {"accuracy": 0.2, "cached": False}
    assert module.state_dict()["0.weight"][0, 0].item() == pytest.approx(0.2)
    assert not (tmp_path / "escaped").exists()
    assert cached(path, Training())[1]["cached"]


class Escape:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_file_of_other_origin_is_not_overwritten(tmp_path: Path):
    path, train = tmp_path / "psi.safetensors", Training()
    save_file({"mine": torch.ones(3)}, path)
    with pytest.raises(UserError, match="was not written by this program; move it away"):
        cached(path, train)
    assert train.calls == 0
    assert load_file(path)["mine"].tolist() == [1.0, 1.0, 1.0]


def test_an_unusable_folder_is_reported_before_training(tmp_path: Path):
    (tmp_path / "file").touch()
    train = Training()
    with pytest.raises(UserError, match="cannot be (read|written)"):
        cached(tmp_path / "file" / "psi.safetensors", train)
    assert train.calls == 0


def test_a_crash_in_training_leaves_no_file(tmp_path: Path):
    def crash(module: nn.Module) -> dict[str, Any]:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        load_or_train(tmp_path / "psi.safetensors", lambda: nn.Linear(2, 2), crash, "x")
    assert list(tmp_path.iterdir()) == []


def shares(rank: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Ten and six of each batch of sixteen."""
    for batch in toy_batches(16, seed=5):
        yield (batch.images[:10], batch.labels[:10]) if rank == 0 else (batch.images[10:], batch.labels[10:])


def run_rank(rank: int, folder: Path) -> None:
    """One of two gloo processes; what it ended with goes to folder/rank-N.safetensors and rank-N.json."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    network = small_network(seed=rank)  # rank 0's weights must win
    options: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.01, "seed": 7, "device": "cpu"}
    head = train_classifier(network, 16, CLASSES, shares(rank), steps=10, **options)
    normed = nn.Sequential(nn.Flatten(), nn.Linear(256, 16), nn.BatchNorm1d(16))
    train_classifier(normed, 16, CLASSES, shares(rank), steps=3, **options)

    # Each rank has its own path: only rank 0's may come into being, and both must get what it holds.
    path = folder / f"cache-{rank}" / "psi.safetensors"
    train = Training(result=0.25 if rank == 0 else 0.75)
    module, miss = cached(path, train)
    _, hit = cached(path, train)
    foreign = folder / "foreign.safetensors"
    if rank == 0:
        save_file({"mine": torch.ones(3)}, foreign)
    try:
        cached(foreign if rank == 0 else folder / "nothing", train)
        error = ""
    except UserError as problem:
        error = str(problem)

    tensors = {f"network.{name}": t for name, t in network.state_dict().items()}
    tensors |= {f"head.{name}": t for name, t in head.state_dict().items()}
    tensors |= {f"normed.{name}": t for name, t in normed.state_dict().items()}
    tensors |= {f"cached.{name}": t for name, t in module.state_dict().items()}
    save_file(tensors, folder / f"rank-{rank}.safetensors")
    summary = {"miss": miss, "hit": hit, "calls": train.calls, "error": error}
    (folder / f"rank-{rank}.json").write_text(json.dumps(summary))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks("tests.test_pretrain", 2, str(folder))
    return folder


@pytest.mark.slow
def test_two_ranks_end_with_identical_weights_and_statistics(two_ranks: Path):
    first, second = (load_file(two_ranks / f"rank-{rank}.safetensors") for rank in range(2))
    assert "normed.2.running_var" in first
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_two_ranks_equal_one_rank_on_the_whole_batch(two_ranks: Path):
    network = small_network(seed=0)
    head = train_classifier(
        network,
        16,
        CLASSES,
        toy_batches(16, seed=5),
        steps=10,
        lr=1e-3,
        weight_decay=0.01,
        seed=7,
        device="cpu",
    )
    distributed = load_file(two_ranks / "rank-0.safetensors")
    moved = (network.get_parameter("0.weight") - small_network(seed=0).get_parameter("0.weight")).abs().max()
    assert moved > 1e-3
    for prefix, module in (("network", network), ("head", head)):
        for name, expected in module.state_dict().items():
            # Gradients differ by the order of float32 sums, about 1e-6 of their size, and AdamW divides by it:
            # each of the 10 steps of 1e-3 is off by some 1e-9, and by more where the terms of a sum cancel.
            torch.testing.assert_close(distributed[f"{prefix}.{name}"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_only_rank_0_reads_and_writes_and_all_ranks_agree(two_ranks: Path):
    first, second = (json.loads((two_ranks / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert first["miss"] == second["miss"] == {"accuracy": 0.25, "cached": False}
    assert first["hit"] == second["hit"] == {"accuracy": 0.25, "cached": True}
    assert first["calls"] == second["calls"] == 1
    assert (two_ranks / "cache-0" / "psi.safetensors").exists()
    assert not (two_ranks / "cache-1").exists()


@pytest.mark.slow
def test_an_error_of_rank_0_reaches_all_ranks(two_ranks: Path):
    first, second = (json.loads((two_ranks / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert "was not written by this program" in first["error"]
    assert first["error"] == second["error"]


if __name__ == "__main__":
    run_rank(int(os.environ["RANK"]), Path(sys.argv[1]))
