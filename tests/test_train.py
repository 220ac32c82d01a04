"""The entry point as a person starts it: what it leaves behind, how it stops and goes on, and what it refuses."""

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import sadm_fast.train as train
from sadm_fast import cli, evaluate
from sadm_fast.build import build_denoiser, build_psi
from sadm_fast.config import load_config
from sadm_fast.config_tree import flatten
from sadm_fast.console import Console
from sadm_fast.feed import open_data
from sadm_fast.gallery import RelationView
from sadm_fast.run.checkpoint import load_player, sha256
from sadm_fast.run.folder import RunFolder
from sadm_fast.run.manifest import FORMAT
from sadm_fast.run.snapshots import reconstructed
from sadm_fast.run.state import TrainState
from tests.support.judge_files import small_vit
from tests.support.programs import Program, assert_same_state, last_checkpoint, lines, start_line, train_here, tree
from tests.support.ranks import ROOT, clean_environment, run_ranks

CLASSES = ("circle", "square", "triangle")
SCRIPT = ROOT / "sadm_fast" / "train.py"
MODULE = "sadm_fast.train"

METRICS = {
    "step", "samples_seen", "loss_denoise", "loss_denoise_q1", "loss_denoise_q2", "loss_denoise_q3", "loss_denoise_q4",
    "structure_distance", "loss_discriminator", "grad_norm_denoiser", "grad_norm_discriminator", "lr",
    "lr_discriminator", "samples_per_s", "flops_per_s", "mfu", "data_wait_fraction", "memory_bytes", "broken_images",
    "skipped_steps", "wall_s", "structure_undefined",
}  # fmt: skip
TIMES = {"samples_per_s", "flops_per_s", "data_wait_fraction", "memory_bytes", "wall_s"}
SCORES = {"fid_classifier", "fid_random", "fid_pixels"}
LOSSES = {"loss_denoise", *(f"loss_denoise_q{quartile}" for quartile in range(1, 5))}


def write_images(root: Path, count: int = 20, size: int = 16) -> Path:
    """root/class/NN.png: grey noise around a brightness of its own for each class."""
    rng = np.random.default_rng(0)
    for c, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.normal(60 + 60 * c, 30, (size, size)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:02d}.png")
    return root


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration of seconds, on images of its own."""
    training = {"steps": 5, "batch": 16}
    path = tmp_path / "tiny.json"
    tiny = {
        "name": "tiny",
        "data": {"path": str(write_images(tmp_path / "images")), "resolution": 8, "channels": 1, "threads": 1},
        "denoiser": {"patch_size": 4, "hidden_size": 16, "depth": 1, "num_heads": 2},
        "structure_encoder": {"width": 8, "feature_dim": 8, "pretrain": training},
        "game": {"mode": "sadm"},
        "discriminator_optimizer": {"lr": 1e-4, "gradient_clipping": 1.0},
        "train": {
            "steps": 6,
            "micro_batch": 4,
            "log_every": 1,
            "sample_every": 3,
            "checkpoint_every": 3,
        },
        "sampling": {"steps": 2, "columns": 3, "rows": 2},
        "evaluate": {"every": None, "samples": 12, "batch": 8, "steps": 2, "judge": training},
    }
    path.write_text(json.dumps(tiny))
    return path


def command(config: Path, run: Path, *overrides: str, ranks: int = 0) -> list[str]:
    """Train into `run`: plain python, or the DeepSpeed launcher for `ranks` processes."""
    changes = [part for override in overrides for part in ("--set", override)]
    return start_line(SCRIPT, "--config", str(config), "--run-dir", str(run), *changes, ranks=ranks)


@pytest.mark.slow
def test_a_run_leaves_everything_behind_and_the_same_command_changes_nothing(
    config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    run = tmp_path / "run"
    argv = command(config, run, "evaluate.every=3", "denoiser.num_classes=5")
    out, err = Program(argv, tmp_path).finish()
    assert "Traceback" not in out + err
    assert "images of 3 classes (none of 3, 4; nothing is drawn of these)" in out
    assert str(run / "report.html") in out

    files = set(tree(run))
    event_files = {name for name in files if name.startswith("tensorboard/")}
    assert event_files
    steps = ("step-000003", "step-000006")
    assert files - event_files == {
        "config.json", "run.json", "metrics.jsonl", "evaluations.jsonl", "report.html", "samples/real.png",
        "pretrained/structure_encoder.safetensors", "pretrained/judge.safetensors",
        *(f"samples/{step}{weights}.png" for step in steps for weights in ("", "-ema")),
        *(f"relations/{step}.{kind}" for step in steps for kind in ("npz", "png")),
        *(f"checkpoints/{step}/{name}" for step in steps for name in ("COMPLETE", "ema.safetensors")),
        *(f"checkpoints/{step}/{player}/rank-0.safetensors" for step in steps
          for player in ("denoiser", "discriminator")),
    }  # fmt: skip

    logged = lines(run / "metrics.jsonl")
    assert [line["step"] for line in logged] == [1, 2, 3, 4, 5, 6]
    assert all(set(line) == METRICS for line in logged)
    assert [line["samples_seen"] for line in logged] == [4, 8, 12, 16, 20, 24]
    for line in logged:
        quartiles = {f"loss_denoise_q{i}" for i in range(1, 5)}  # four samples need not fall into all of them
        assert line["mfu"] is None  # of a CPU
        assert all(np.isfinite(line[key]) for key in METRICS - quartiles - {"mfu"})
        assert line["skipped_steps"] == 0 and 0 <= line["data_wait_fraction"] <= 1
        assert line["structure_distance"] >= 0 and line["grad_norm_discriminator"] > 0

    scores = lines(run / "evaluations.jsonl")
    assert [line["step"] for line in scores] == [3, 6]
    for line in scores:
        facts = {"step", "samples", "floor", "sampling", "weights", "reference", "seconds", "images_per_s"}
        assert set(line) == facts | SCORES | LOSSES and all(line[key] > 0 for key in LOSSES)
        assert line["samples"] == 12 and set(line["floor"]) == SCORES
    judge = ["--judges", f"vit={small_vit(tmp_path)}", "--json"]
    said = run_ranks("sadm_fast.evaluate", 2, str(run), *judge, str(tmp_path / "two.json"))
    assert "".join(said).count("12 samples; floor") == 1, "both ranks have printed"
    assert evaluate.main([str(run), *judge, str(tmp_path / "one.json")]) == 0
    one, two = (json.loads((tmp_path / f"{ranks}.json").read_text())["scores"][0] for ranks in ("one", "two"))
    assert {name: two[name] for name in SCORES | LOSSES} == pytest.approx(
        {name: scores[-1][name] for name in SCORES | LOSSES}
    )
    for row in (one, two):
        assert row.pop("seconds") > 0 and row.pop("images_per_s") > 0
    assert flatten(two) == pytest.approx(flatten(one)) and two["fd_vit"] > 0
    facts = json.loads((run / "run.json").read_text())
    assert facts["classes"] == list(CLASSES) and facts["parameters"].keys() == {"denoiser", "discriminator"}
    assert facts["structure_encoder"]["accuracy"] is not None and facts["judge"]["accuracy"] is not None
    with np.load(run / "relations" / "step-000003.npz", allow_pickle=False) as relations:
        count = len(relations["labels"])
        assert relations["real"].shape == relations["fake"].shape == (count, count)
        then = relations["real"]
    # Psi of a checkpoint is the one that looked at that step.
    resolved = load_config(config, ["denoiser.num_classes=5"])
    psi = build_psi(resolved).eval()
    load_player(run / "checkpoints" / "step-000003", "discriminator", psi)
    view = RelationView(resolved, open_data(resolved, Console(), check=False), torch.device("cpu"))
    view.save(tmp_path / "again.npz", build_denoiser(resolved, 5), psi)
    np.testing.assert_allclose(np.load(tmp_path / "again.npz")["real"], then, rtol=0, atol=1e-6)
    assert load_config(run / "config.json").resolved() == json.loads((run / "config.json").read_text())

    # The average is a whole state: a network and another run start from it.
    weights = run / "checkpoints" / "step-000006" / "ema.safetensors"
    assert load_file(weights).keys() == build_denoiser(load_config(config), len(CLASSES)).state_dict().keys()
    dry_run(config, tmp_path / "another", capfd, f"denoiser.weights={weights}")

    # What people and file managers leave in a run folder ends nothing and stays.
    shutil.copytree(run / "checkpoints" / "step-000006", run / "checkpoints" / "step-000009 (copy)")
    shutil.copytree(run / "checkpoints" / "step-000006", run / "checkpoints" / "step-000006.bak")
    (run / "checkpoints" / "step-best").mkdir()
    (run / "samples" / "step-000099.png").mkdir()
    for name in ("samples/step-best.png", "samples/step-000010 (copy).png", "relations/step-x.npz"):
        (run / name).touch()

    before = tree(run / "checkpoints") | {"metrics": (run / "metrics.jsonl").read_bytes()}
    train_here(*argv[2:])
    assert f"Continuing {run} at step 6" in capfd.readouterr().out
    assert tree(run / "checkpoints") | {"metrics": (run / "metrics.jsonl").read_bytes()} == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "players"),
    [
        (["game.mode=plain"], ["denoiser"]),
        (["game.mode=structure", "train.grad_accumulation=2", "implementation=reference"], ["denoiser"]),
        (
            ["train.precision=bf16", "deepspeed.zero_optimization.stage=2", "data.loader=torch"],
            ["denoiser", "discriminator"],
        ),
    ],
    ids=["plain", "structure", "zero2-bf16"],
)
def test_other_modes_train(
    config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], overrides: list[str], players: list[str]
):
    run = tmp_path / "run"
    train_here(*command(config, run, "train.steps=3", *overrides)[2:])
    assert "Traceback" not in capfd.readouterr().err
    logged = lines(run / "metrics.jsonl")
    assert [line["step"] for line in logged] == [1, 2, 3]
    assert all(set(line) == METRICS for line in logged)
    assert all(line["loss_denoise"] > 0 and line["grad_norm_denoiser"] > 0 for line in logged)
    mode = json.loads((run / "config.json").read_text())["game"]["mode"]
    for line in logged:
        assert (line["structure_distance"] is None) == (mode == "plain")
        assert (line["loss_discriminator"] is None) == (mode != "sadm")
        assert (line["grad_norm_discriminator"] is None) == (mode != "sadm")
    saved = run / "checkpoints" / "step-000003"
    assert sorted(path.name for path in saved.iterdir() if path.is_dir()) == players
    assert (run / "relations" / "step-000003.npz").exists() == (mode != "plain")
    assert (run / "report.html").exists()


@pytest.mark.slow
def test_a_stopped_run_continues_bit_for_bit(config: Path, tmp_path: Path):
    steps = 120
    overrides = [f"train.steps={steps}", "train.sample_every=1000", "train.checkpoint_every=1000"]
    run_ranks(MODULE, 1, *command(config, tmp_path / "whole", *overrides)[2:])

    stopped = tmp_path / "stopped"
    scored = ["evaluate.every=40", "evaluate.guidance=[1,2]"]  # evaluating changes nothing of the training
    argv, metrics = command(config, stopped, *overrides, *scored), stopped / "metrics.jsonl"
    at = 0
    for number in (signal.SIGINT, signal.SIGTERM):
        program = Program(argv, tmp_path)
        program.at_step(at + 3, metrics, partial(program.process.send_signal, number))
        out, err = program.finish(cli.EXIT_STOPPED)
        assert "Traceback" not in out + err
        at, before = last_checkpoint(stopped), at
        assert before + 3 <= at < steps
        assert f"stopped at step {at} of {steps}; the same command continues" in out
    (said,) = run_ranks(MODULE, 1, *argv[2:])
    assert f"Continuing {stopped} at step {at}" in said
    assert [line["step"] for line in lines(stopped / "evaluations.jsonl")] == [40, 40, 80, 80, 120, 120]

    end = f"step-{steps:06d}"
    assert_same_state(stopped / "checkpoints" / end, tmp_path / "whole" / "checkpoints" / end)
    whole, parts = lines(tmp_path / "whole" / "metrics.jsonl"), lines(metrics)
    assert [{k: v for k, v in line.items() if k not in TIMES} for line in parts] == [
        {k: v for k, v in line.items() if k not in TIMES} for line in whole
    ]


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Euclidean, of all weights together."""
    return sum(float((a[name].double() - b[name].double()).square().sum()) for name in b) ** 0.5


@pytest.mark.slow
def test_two_ranks_stop_under_the_launcher_and_continue(config: Path, tmp_path: Path):
    steps = 60
    overrides = [
        f"train.steps={steps}", "game.scope=global", "deepspeed.zero_optimization.stage=2",
        "train.sample_every=1000", "train.checkpoint_every=10", "train.ema_snapshot_every=10",
        "train.more_ema=" + json.dumps([{"profile": "power", "std": std} for std in (0.05, 0.08)]),
    ]  # fmt: skip
    run_ranks(MODULE, 2, *command(config, tmp_path / "whole", *overrides)[2:])
    end = f"step-{steps:06d}"
    saved = tmp_path / "whole" / "checkpoints" / end
    assert json.loads((saved / "COMPLETE").read_text())["world_size"] == 2
    parts = {"rank-0.safetensors", "rank-1.safetensors"}
    assert {path.name for path in (saved / "denoiser").iterdir()} == parts
    logged = lines(tmp_path / "whole" / "metrics.jsonl")
    assert [line["samples_seen"] for line in logged] == [8 * (i + 1) for i in range(steps)]

    stopped = tmp_path / "stopped"
    program = Program(command(config, stopped, *overrides, ranks=2), tmp_path)
    # Ctrl-C on a terminal reaches the launcher and every rank.
    program.at_step(3, stopped / "metrics.jsonl", lambda: os.killpg(program.process.pid, signal.SIGINT))
    program.finish(code=None)  # the launcher does not pass the ranks' exit code on
    reached = last_checkpoint(stopped)
    assert 3 <= reached < steps
    said = run_ranks(MODULE, 2, *command(config, stopped, *overrides)[2:])
    assert f"Continuing {stopped} at step {reached}" in said[0]
    assert_same_state(stopped / "checkpoints" / end, saved)

    # The average of length 0.08, made of snapshots of two others, against the one that was kept through all steps.
    shutil.rmtree(stopped / "snapshots" / "power-0.08")
    files = ("ema.safetensors", "ema-power-0.05.safetensors", "ema-power-0.08.safetensors")
    long, short, exact = (load_file(saved / file) for file in files)
    found = reconstructed(stopped / "snapshots", steps, 0.08)
    nearest = min(distance(other, exact) for other in (long, short))
    assert found.keys() == exact.keys() and 0 < distance(found, exact) < 0.1 * nearest


@pytest.mark.soak
def test_a_run_goes_on_with_another_number_of_ranks_at_another_stage(config: Path, tmp_path: Path):
    def overrides(steps: int, accumulation: int, stage: int) -> list[str]:
        return [
            f"train.steps={steps}", f"train.grad_accumulation={accumulation}", "denoiser_optimizer.eps=1e-2",
            "discriminator_optimizer.eps=1e-2", f"deepspeed.zero_optimization.stage={stage}",
        ]  # fmt: skip

    def alone(run: Path, steps: int) -> None:
        Program(command(config, run, *overrides(steps, 2, 0)), tmp_path).finish()

    alone(tmp_path / "whole", 8)
    alone(tmp_path / "moved", 4)
    Program(command(config, tmp_path / "moved", *overrides(8, 1, 2), ranks=2), tmp_path).finish()
    whole, moved = lines(tmp_path / "whole" / "metrics.jsonl"), lines(tmp_path / "moved" / "metrics.jsonl")
    for a, b in zip(whole, moved, strict=True):
        assert a["samples_seen"] == b["samples_seen"]
        # The same samples, noise and weights: sums in another order, over 8 steps (eps keeps AdamW from magnifying it).
        assert b["loss_denoise"] == pytest.approx(a["loss_denoise"], rel=1e-4)
        assert b["structure_distance"] == pytest.approx(a["structure_distance"], rel=1e-3)


def refused_division(config: Path, run: Path, capfd: pytest.CaptureFixture[str], *overrides: str) -> None:
    refused(command(config, run, *overrides)[2:], capfd, ["step-000003", "samples_"])


@pytest.mark.slow
def test_another_batch_is_another_run(config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    train_here(*command(config, tmp_path / "run", "train.steps=3", "train.grad_accumulation=2")[2:])
    capfd.readouterr()
    refused_division(config, tmp_path / "run", capfd, "train.grad_accumulation=1")  # half as many samples a step
    changed = ["train.grad_accumulation=1", "train.micro_batch=8"]  # as many samples, but S compares twice as many
    refused_division(config, tmp_path / "run", capfd, *changed)


def dry_run(config: Path, run: Path, capfd: pytest.CaptureFixture[str], *overrides: str) -> str:
    arguments = command(config, run, *overrides)[2:]
    assert train.main([*arguments, "--dry-run"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    return out


def test_a_dry_run_tells_the_cost_and_writes_nothing(config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    out = dry_run(config, tmp_path / "run", capfd)
    shown, end = json.JSONDecoder().raw_decode(out)
    assert shown == load_config(config).resolved()
    rest = out[end:]
    for word in ("denoiser", "discriminator", "parameters", "3 classes", "GFLOP", "GMAC", "Memory of one rank", "MiB"):
        assert word in rest, word
    assert re.search(r"\ndata\.path=.*: \d+ samples of 3 classes\n$", rest)
    assert not (tmp_path / "run").exists()
    plain = dry_run(config, tmp_path / "run", capfd, "game.mode=plain")
    assert "discriminator  " not in plain


Spoil = Callable[[Path, Path], list[str]]  # (configuration, run folder) -> overrides


def no_folder(config: Path, run: Path) -> list[str]:
    return [f"data.path={config.parent / 'nowhere'}"]


def empty_folder(config: Path, run: Path) -> list[str]:
    (config.parent / "empty").mkdir()
    return [f"data.path={config.parent / 'empty'}"]


def no_classes(config: Path, run: Path) -> list[str]:
    return [f"data.path={config.parent / 'images' / 'circle'}"]


def empty_class(config: Path, run: Path) -> list[str]:
    (config.parent / "images" / "hexagon").mkdir()
    return []


def not_an_image(config: Path, run: Path) -> list[str]:
    (config.parent / "images" / "circle" / "07.png").write_text("not an image")
    return []


def not_an_image_by_name(config: Path, run: Path) -> list[str]:
    (config.parent / "images" / "circle" / "notes.txt").write_text("remember")
    return []


def small_image(config: Path, run: Path) -> list[str]:
    Image.new("L", (7, 16)).save(config.parent / "images" / "square" / "small.png")
    return []


def other_configuration(config: Path, run: Path) -> list[str]:
    RunFolder(run).claim(load_config(config))
    (run / "checkpoints" / "step-000003").mkdir()
    (run / "checkpoints" / "step-000003" / "COMPLETE").touch()  # without one, the folder is free for a corrected start
    return ["game.lambda_s=0.7"]


def foreign_folder(config: Path, run: Path) -> list[str]:
    run.mkdir()
    (run / "thesis.tex").write_text("years of work")
    return []


def damaged_config_in_folder(config: Path, run: Path) -> list[str]:
    RunFolder(run).claim(load_config(config))
    (run / "config.json").write_text("{")
    return []


def run_is_a_file(config: Path, run: Path) -> list[str]:
    run.write_text("mine")
    return []


def other_weights(config: Path, run: Path) -> list[str]:
    path = config.parent / "psi.safetensors"
    save_file({"conv1.weight": torch.zeros(64, 3, 7, 7)}, path)
    return [f"structure_encoder.weights={path}"]


def not_safetensors(config: Path, run: Path) -> list[str]:
    (config.parent / "x.safetensors").write_text("1234567")
    return ["game.mode=plain", f"denoiser.weights={config.parent / 'x.safetensors'}"]


def one_image_of_each_class(config: Path, run: Path) -> list[str]:
    for path in (config.parent / "images").glob("*/*.png"):
        if path.stem != "00":
            path.unlink()
    return []


def one_class(config: Path, run: Path) -> list[str]:
    for name in CLASSES[1:]:
        shutil.rmtree(config.parent / "images" / name)
    return []


def one_class_to_judge(config: Path, run: Path) -> list[str]:
    return [*one_class(config, run), "game.mode=plain", "evaluate.every=1"]


def checkpoint_of(manifest: dict[str, Any]) -> Spoil:
    def spoil(config: Path, run: Path) -> list[str]:
        RunFolder(run).claim(load_config(config))
        folder = run / "checkpoints" / "step-000003"
        folder.mkdir()
        save_file({}, folder / "ema.safetensors")
        whole = {
            "format": FORMAT, "step": 3, "world_size": 1, "optimizer_steps": {},
            "state": TrainState(step=3, ema_updates=3).to_json(),
            "files": {"ema.safetensors": sha256(folder / "ema.safetensors")},
        }  # fmt: skip
        (folder / "COMPLETE").write_text(json.dumps(whole | manifest))
        return []

    return spoil


BAD: dict[str, tuple[Spoil, list[str]]] = {
    "missing data folder": (no_folder, ["data.path=", "nowhere", "no such folder"]),
    "empty data folder": (empty_folder, ["data.path=", "empty"]),
    "no class folders": (no_classes, ["data.path=", "no class subfolders", "00.png"]),
    "class without images": (empty_class, ["hexagon", "no images"]),
    "not an image": (not_an_image, ["circle/07.png", "is not an image"]),
    "not an image by its name": (not_an_image_by_name, ["circle/notes.txt", "not an image"]),
    "image smaller than the crop": (small_image, ["square/small.png", "7 pixels", "data.resolution=8"]),
    "too few classes": (lambda *_: ["denoiser.num_classes=2"], ["denoiser.num_classes=2", "3"]),
    "unknown key": (lambda *_: ["train.setps=3"], ["train.setps", "steps"]),
    "wrong type": (lambda *_: ["train.steps=many"], ["train.steps", "many"]),
    "impossible sizes": (lambda *_: ["data.resolution=10"], ["data.resolution=10", "multiple of", "4"]),
    "impossible heads": (lambda *_: ["denoiser.num_heads=3"], ["hidden_size=16", "num_heads=3"]),
    "impossible game": (lambda *_: ["train.micro_batch=1"], ["train.micro_batch=1", "at least 2"]),
    "no such override": (lambda *_: ["train.steps"], ["--set train.steps", "key.path=value"]),
    "another configuration's folder": (other_configuration, ["game.lambda_s", "0.3", "0.7", "--run-dir"]),
    "somebody's folder": (foreign_folder, ["run folder", "no config.json", "--run-dir"]),
    "damaged config.json": (damaged_config_in_folder, ["config.json", "cannot be read"]),
    "run folder is a file": (run_is_a_file, ["is a file", "--run-dir"]),
    "checkpoint of another format": (checkpoint_of({"format": 99}), ["step-000003", "format 99", "--run-dir"]),
    "checkpoint of another model": (
        checkpoint_of({"configuration": "other"}),
        ["step-000003", "configuration", "other", "--run-dir"],
    ),
    "Psi weights that do not fit": (other_weights, ["structure_encoder.weights", "psi.safetensors", "does not fit"]),
    "denoiser weights that cannot be read": (
        not_safetensors,
        ["denoiser.weights=", "x.safetensors: cannot be read as"],
    ),
    "one image of each class": (
        one_image_of_each_class,
        ["structure_encoder.weights=null", "3 images in 3 classes are too few", "game.mode=plain"],
    ),
    "one class and no Psi weights": (one_class, ["structure_encoder.weights=null", "only one", "game.mode=plain"]),
    "one class and a judge": (one_class_to_judge, ["evaluate.every=1", "only one", "evaluate.every=null"]),
    "missing Psi weights": (
        lambda *_: ["structure_encoder.weights=nowhere.safetensors"],
        ["structure_encoder.weights", "nowhere.safetensors"],
    ),
    "no apex": (
        lambda *_: ["denoiser_optimizer.type=apex_fused_adam"],
        ["denoiser_optimizer.type=apex_fused_adam", "apex is not installed"],
    ),
}


# What --dry-run leaves to the training: decoding all images, and reading checkpoints.
NOT_IN_A_DRY_RUN = {
    "not an image",
    "image smaller than the crop",
    "checkpoint of another format",
    "checkpoint of another model",
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_in_one_line(config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], case: str):
    spoil, words = BAD[case]
    run = tmp_path / "run"
    overrides = spoil(config, run)
    before, there = tree(tmp_path), run.exists()
    refused(command(config, run, *overrides)[2:], capfd, words)
    if case not in NOT_IN_A_DRY_RUN:
        refused([*command(config, run, *overrides)[2:], "--dry-run"], capfd, words)
    assert run.exists() == there, "a run that cannot start has claimed its folder"
    after = tree(tmp_path)
    assert {name: after.get(name) for name in before} == before, "something existing was changed"


def refused(argv: list[str], capfd: pytest.CaptureFixture[str], words: list[str]) -> None:
    """`train.main` returns 2 and says one line on stderr with all the words in it."""
    capfd.readouterr()
    assert train.main(argv) == cli.EXIT_USER_ERROR
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err
    assert err.count("\n") == 1 and err.startswith("error: "), err
    for word in words:
        assert word in err, f"{word!r} is not in {err!r}"


@pytest.mark.parametrize("text", ["", "{", "[]", None])
def test_a_bad_config_file_ends_in_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str], text: str | None):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    refused(["--config", str(path), "--run-dir", str(tmp_path / "run")], capfd, [str(path)])


@pytest.mark.parametrize("where", ["under a file", "in /proc", "no permission"])
def test_a_folder_that_cannot_be_written_ends_in_one_line(
    config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, where: str
):
    run = {"under a file": config / "run", "in /proc": Path("/proc/run"), "no permission": tmp_path / "run"}[where]
    if where == "no permission":  # root may write everywhere
        monkeypatch.setattr(os, "access", lambda *_: False)
    refused(command(config, run)[2:], capfd, [str(run), "--run-dir"])
    assert config.is_file()


@pytest.mark.slow
def test_the_one_line_stays_alone_when_started_as_a_program(config: Path, tmp_path: Path):
    (tmp_path / "images" / "circle" / "07.png").write_text("not an image")
    environment = {name: value for name, value in clean_environment().items() if name != "DS_ACCELERATOR"}
    done = subprocess.run(
        command(config, tmp_path / "run"),
        cwd=tmp_path,
        env=environment,
        text=True,
        capture_output=True,
        timeout=600,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "circle/07.png" in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "run").exists()
