"""configs/imagenet256.json and imagenet512.json: planned as they stand, and trained narrower than they are."""

import json
from pathlib import Path

import pytest
from PIL import Image

import sadm_fast.train as train
from sadm_fast import encode
from sadm_fast.config import load_config
from tests.support.autoencoders import save_autoencoder
from tests.support.programs import Program, lines, start_line, train_here
from tests.support.ranks import ROOT

SCRIPT = ROOT / "sadm_fast" / "train.py"
NAMES = ("imagenet256", "imagenet512")
IMAGES = 20  # of two classes: a tenth of each is held out from Psi's own training

# What makes it seconds instead of days: narrower, shorter, fewer; the game from the start.
NARROWER = [
    "denoiser.name=null", "denoiser.patch_size=8", "denoiser.hidden_size=32", "denoiser.depth=1",
    "denoiser.num_heads=2", "train.micro_batch=2", "structure_encoder.pretrain.steps=1",
    "structure_encoder.pretrain.batch=4", "game.start_step=0", "train.steps=1",
    "sampling.steps=1", "sampling.columns=1", "sampling.rows=1", "data.threads=1", "data.resolution=128",
]  # fmt: skip


def config_file(name: str) -> str:
    return str(ROOT / f"configs/{name}.json")


@pytest.mark.parametrize("name", NAMES)
def test_they_are_what_the_paper_trains(name: str) -> None:
    config = load_config(config_file(name))
    zero = config.deepspeed.zero_optimization
    assert config.denoiser.name == "DiT-XL/2" and config.data.source == "latents" and config.game.mode == "sadm"
    assert config.train.precision == "bf16" and config.train.compile == "on" and config.game.scope == "global"
    assert zero.stage >= 1 and zero.overlap_comm


@pytest.mark.parametrize("name", NAMES)
def test_a_dry_run_needs_no_data(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train.main(["--config", config_file(name), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert f'"name": "{name}"' in text and "denoiser forward" in text and "Memory of one rank" in text
    assert not list(tmp_path.iterdir())


def some_images(root: Path) -> None:
    for number, name in enumerate(("n01440764", "n01443537")):
        (root / name).mkdir(parents=True)
        for i in range(IMAGES // 2):
            image = Image.linear_gradient("L").rotate(36 * i + 18 * number).resize((40, 30))
            image.convert("RGB").save(root / name / f"{name}_{i}.JPEG")


# As it stands it compiles, which takes each rank a minute of C++. Two ranks, stages and scopes: tests/engine.
@pytest.mark.parametrize(("ranks", "compiled"), [(1, "false"), pytest.param(2, "true", marks=pytest.mark.soak)])
@pytest.mark.slow
def test_one_iteration_from_cached_latents(
    ranks: int, compiled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "imagenet512"  # ZeRO-2 and accumulation; 256 has stage 1, which this trainer steps in the same way
    monkeypatch.setenv("SADM_CACHE", str(tmp_path / "cache"))
    some_images(tmp_path / "images")
    autoencoder = save_autoencoder(
        tmp_path / "autoencoder",
        block_out_channels=(4, 4, 4, 4),
        norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    overrides = [
        *NARROWER, f"data.path={tmp_path / 'latents'}", f"latents.autoencoder={autoencoder}",
        f"latents.images={tmp_path / 'images'}", "latents.batch=4", f"train.compile={compiled}",
    ]  # fmt: skip
    arguments = ["--config", config_file(name), *(part for override in overrides for part in ("--set", override))]
    assert encode.main(arguments) == 0
    run = tmp_path / "run"
    if ranks == 1:
        train_here(*arguments, "--run-dir", str(run))
    else:
        Program(start_line(SCRIPT, *arguments, "--run-dir", str(run), ranks=ranks), tmp_path).finish()
    (line,) = lines(run / "metrics.jsonl")
    accumulation = load_config(config_file(name)).train.grad_accumulation
    assert line["step"] == 1 and line["samples_seen"] == 2 * ranks * accumulation and line["skipped_steps"] == 0
    assert line["grad_norm_denoiser"] > 0 and line["grad_norm_discriminator"] > 0
    assert line["structure_distance"] is not None
    assert json.loads((run / "checkpoints/step-000001/COMPLETE").read_text())["world_size"] == ranks
