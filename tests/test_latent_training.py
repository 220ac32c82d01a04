"""Training on cached latents as a person does it: encode, train, stop, go on with two ranks, sample."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import sadm_fast.train as train
from sadm_fast import encode, evaluate, sample
from sadm_fast.ranks import launch
from tests.data.lightning import write_lightning_latents
from tests.support.autoencoders import save_autoencoder
from tests.support.programs import Program, assert_same_state, last_checkpoint, lines, start_line, train_here
from tests.support.ranks import ROOT, run_ranks

SCRIPT = ROOT / "sadm_fast" / "train.py"
STEPS = 10


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration of seconds with its latents made: 36 images of 3 classes, latents [4, 8, 8]."""
    root = tmp_path_factory.mktemp("latent-training")
    for c, name in enumerate(("dark", "medium", "bright")):
        (root / "images" / name).mkdir(parents=True)
        for i in range(12):
            image = Image.linear_gradient("L").resize((16 + i, 20)).point(lambda v, c=c: v // 3 + 80 * c)
            image.convert("RGB").save(root / "images" / name / f"{i}.jpg")
    path = root / "tiny.json"
    tiny = {
        "name": "tiny",
        "data": {
            "source": "latents", "path": str(root / "latents"), "resolution": 16, "channels": 3, "flip": True,
            "threads": 1,
        },
        "latents": {
            "autoencoder": str(save_autoencoder(root / "autoencoder")), "downsample": 2,
            "images": str(root / "images"), "shard_size": 8,
        },
        "denoiser": {"patch_size": 2, "hidden_size": 16, "depth": 1, "num_heads": 2},
        "structure_encoder": {"width": 8, "feature_dim": 8, "pretrain": {"steps": 5, "batch": 16}},
        "game": {"mode": "sadm", "scope": "global"},
        "train": {
            "steps": STEPS, "micro_batch": 4, "log_every": 1, "sample_every": 1000, "checkpoint_every": 1000,
        },
        "sampling": {"steps": 2, "columns": 3, "rows": 2},
        "deepspeed": {"zero_optimization": {"stage": 1}},
    }  # fmt: skip
    path.write_text(json.dumps(tiny))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SADM_CACHE", str(root / "cache"))
        assert encode.main(["--config", str(path)]) == 0
    return path


@pytest.fixture(autouse=True)
def cache(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SADM_CACHE", str(config.parent / "cache"))


def trained(config: Path, run: Path, *overrides: str) -> int:
    changes = [part for override in overrides for part in ("--set", override)]
    return train.main(["--config", str(config), "--run-dir", str(run), *changes])


@pytest.fixture(scope="module")
def run(config: Path) -> Path:
    """A run of four steps."""
    folder = config.parent / "short"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SADM_CACHE", str(config.parent / "cache"))
        train_here("--config", str(config), "--run-dir", str(folder), "--set", "train.steps=4")
    return folder


@pytest.mark.soak
def test_a_stopped_run_ends_as_an_uninterrupted_one(config: Path, run: Path, tmp_path: Path) -> None:
    stopped = shutil.copytree(run, tmp_path / "stopped")  # after 16 samples of an epoch of 36
    for folder in (stopped, tmp_path / "whole"):
        changes = ["--run-dir", str(folder), "--set", f"train.steps={STEPS}"]
        Program(start_line(SCRIPT, "--config", str(config), *changes), tmp_path).finish()
    end = f"checkpoints/step-{STEPS:06d}"
    assert_same_state(stopped / end, tmp_path / "whole" / end)


@pytest.mark.slow
def test_two_ranks_go_on_where_one_has_stopped_and_score_their_decoded_samples(
    config: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = shutil.copytree(run, tmp_path / "stopped")
    changes = ["--set", f"train.steps={STEPS}", "--set", "train.micro_batch=2", "--set", "evaluate.every=5"]
    changes += ["--set", "evaluate.samples=9", "--set", "evaluate.batch=2", "--set", "evaluate.guidance=[1,2]"]
    said = run_ranks("sadm_fast.train", 2, "--config", str(config), "--run-dir", str(stopped), *changes)
    assert "at step 4" in said[0] and last_checkpoint(stopped) == STEPS
    assert [line["samples_seen"] for line in lines(stopped / "metrics.jsonl")] == [4 * (i + 1) for i in range(STEPS)]
    scored = lines(stopped / "evaluations.jsonl")
    assert [row["step"] for row in scored] == [5, 5, 10, 10]

    @contextmanager
    def alone(*, deepspeed: bool) -> Iterator[launch.Place]:
        yield launch.Place(0, 1, torch.device("cpu"))

    monkeypatch.setattr(launch, "distributed", alone)
    written = tmp_path / "scores.json"
    assert evaluate.main([str(stopped), "--sweep", "guidance=1,2", "--json", str(written)]) == 0
    for during, after in zip(scored[2:], json.loads(written.read_text())["scores"], strict=True):
        assert during["floor"].keys() == {"fid_random", "fid_pixels"} and during["samples"] == 9
        same = {"sampling", "samples", "reference"}
        assert {key: during[key] for key in same} == {key: after[key] for key in same}
        for key in ("fid_random", "fid_pixels", "loss_denoise", "loss_denoise_q1", "loss_denoise_q4"):
            assert during[key] == pytest.approx(after[key], rel=1e-4)  # matrix products of other sizes round otherwise


def test_pictures_are_decoded(run: Path) -> None:
    for name in ("real.png", "step-000004-ema.png"):
        with Image.open(run / "samples" / name) as picture:
            assert picture.mode == "RGB" and picture.width > 3 * 16


@pytest.mark.slow
def test_a_run_is_scored_decoded_and_without_a_classifier(run: Path, tmp_path: Path) -> None:
    scores = tmp_path / "scores.json"
    run_ranks("sadm_fast.evaluate", 2, str(run), "--samples", "8", "--json", str(scores))
    (row,) = json.loads(scores.read_text())["scores"]
    assert set(row["floor"]) == set(row["kid"]) == {"fid_random", "fid_pixels"} and row["samples"] == 8
    assert not (run / "pretrained" / "judge.safetensors").exists()


def test_the_checkpoint_carries_the_autoencoders_identity(config: Path, run: Path) -> None:
    there = json.loads((run / "checkpoints/step-000004/COMPLETE").read_text())["latent_space"]
    made = json.loads((config.parent / "latents/manifest.json").read_text())["encoding"]
    assert there == {"autoencoder": made["autoencoder"], "scale": 0.5, "shift": 0.0}


def test_latents_of_another_program_are_trained_on_and_drawn_with_their_own_scale(
    config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_lightning_latents(tmp_path / "set", 36)
    run = tmp_path / "run"
    settings = [f"data.path={tmp_path / 'set'}", "latents.autoencoder=null", "train.steps=2", "train.sample_every=1"]
    train_here("--config", str(config), "--run-dir", str(run), *(x for text in settings for x in ("--set", text)))
    space = json.loads((run / "checkpoints/step-000002/COMPLETE").read_text())["latent_space"]
    assert space["autoencoder"] is None and len(space["scale"]) == len(space["shift"]) == 4
    with np.load(run / "samples/step-000002-ema.npz") as samples:
        assert samples["samples"].shape == (6, 4, 8, 8)
    capfd.readouterr()
    assert sample.main([str(run), "--count", "3"]) == 2 and "its samples are no pictures" in refusal(capfd)
    drawn = ["--count", "3", "--out", str(tmp_path / "x.png"), "--autoencoder", str(config.parent / "autoencoder")]
    assert sample.main([str(run), *drawn]) == 0 and (tmp_path / "x.png").exists()


def refusal(capfd: pytest.CaptureFixture[str]) -> str:
    err = capfd.readouterr().err
    assert "Traceback" not in err and err.count("\n") == 1 and err.startswith("error: "), err
    return err


def test_sampling_needs_the_same_autoencoder_wherever_it_lies(
    config: Path, run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    moved = shutil.copytree(config.parent / "autoencoder", tmp_path / "moved")
    arguments = [str(run), "--count", "3", "--out", str(tmp_path / "grid.png"), "--autoencoder"]
    assert sample.main([*arguments, str(moved)]) == 0 and (tmp_path / "grid.png").exists()
    capfd.readouterr()
    other = save_autoencoder(tmp_path / "other", seed=1)
    assert sample.main([*arguments, str(other)]) == 2
    assert "has autoencoder sha256" in (message := refusal(capfd)) and "checkpoint" in message


def test_training_needs_the_autoencoder_of_the_latents(
    config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = save_autoencoder(tmp_path / "other", seed=1)
    assert trained(config, tmp_path / "run", f"latents.autoencoder={other}") == 2
    assert "has autoencoder sha256" in (message := refusal(capfd)) and "data.path=" in message
    assert not (tmp_path / "run").exists()


def test_a_run_does_not_go_on_with_latents_of_another_autoencoder(
    config: Path, run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = save_autoencoder(tmp_path / "other", seed=1)
    latents = [f"data.path={tmp_path / 'latents'}", f"latents.autoencoder={other}"]
    changes = [part for override in latents for part in ("--set", override)]
    assert encode.main(["--config", str(config), *changes]) == 0
    capfd.readouterr()
    assert trained(config, run, "train.steps=8", *latents) == 2
    assert "step-000004: data is" in refusal(capfd)


def test_fine_tuning_starts_from_weights_and_takes_another_number_of_classes(
    config: Path, run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    averaged = load_file(run / "checkpoints/step-000004/ema.safetensors")
    from sadm_fast.build import build_denoiser
    from sadm_fast.config import load_config
    from sadm_fast.exchange.starting import start_from_weights

    before = build_denoiser(load_config(config), 3).state_dict() | averaged
    save_file({name: value.contiguous() for name, value in before.items()}, tmp_path / "weights.safetensors")
    changed = load_config(config, [f"denoiser.weights={tmp_path / 'weights.safetensors'}"])
    denoiser = build_denoiser(changed, 5)
    table = denoiser.get_parameter("y_embedder.embedding_table.weight").clone()
    start_from_weights(changed, denoiser)
    assert denoiser.get_parameter("y_embedder.embedding_table.weight").equal(table)
    rest = {name: value for name, value in denoiser.state_dict().items() if "embedding_table" not in name}
    assert all(value.equal(before[name]) for name, value in rest.items())

    assert trained(config, tmp_path / "run", "denoiser.weights=nowhere.safetensors") == 2
    assert "denoiser.weights=nowhere.safetensors: there is no such file" in refusal(capfd)
    wide = [f"denoiser.weights={tmp_path / 'weights.safetensors'}", "denoiser.hidden_size=32"]
    assert trained(config, tmp_path / "wide", *wide) == 2
    assert "does not fit this configuration's denoiser" in refusal(capfd)
