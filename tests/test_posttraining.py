"""The game as post-training: both players start from somebody else's weights, the discriminator first alone."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sadm_fast import encode
from sadm_fast.build import build_denoiser, build_psi
from sadm_fast.config import Config, check_config, load_config
from sadm_fast.engine.players import Players
from tests.support.autoencoders import save_autoencoder
from tests.support.programs import assert_same_state, lines, train_here
from tests.support.ranks import ROOT
from tests.test_imagenet_configs import NARROWER, some_images

CLASSES = 10
POSTTRAIN = ROOT / "configs/imagenet256_posttrain.json"


def random_weights(network: torch.nn.Module, path: Path) -> Path:
    """A .pt of the network's state in which no weight is 0."""
    generator = torch.Generator().manual_seed(0)
    fixed = {name for name, p in network.named_parameters() if not p.requires_grad}
    state = {
        name: value if name in fixed or "running" in name else torch.randn(value.shape, generator=generator) * 0.05
        for name, value in network.state_dict().items()
        if value.is_floating_point()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    return path


def digits(folder: Path) -> dict[str, Any]:
    """configs/imagenet256_posttrain.json in small: a DiT of DiT's kind and a ViT in DINOv2's layout, on the digits."""
    tree: dict[str, Any] = {
        "name": "digits_posttrain",
        "data": {"path": "demo:mnist5k", "resolution": 16, "channels": 1},
        "diffusion": {"process": "vp", "learn_sigma": True},
        "denoiser": {"patch_size": 4, "hidden_size": 32, "depth": 1, "num_heads": 2},
        "structure_encoder": {
            "architecture": "vit", "width": 32, "depth": 1, "patch_size": 4, "input_size": 16, "position_grid": 4,
        },
        "game": {"mode": "sadm", "warmup_steps": 3, "ramp_steps": 2},
        "denoiser_optimizer": {"lr": 1e-3, "weight_decay": 0.1, "warmup_steps": 2},
        "discriminator_optimizer": {"lr": 1e-3, "betas": [0.0, 0.99]},
        "train": {
            "steps": 5, "micro_batch": 8, "log_every": 1, "sample_every": 100, "checkpoint_every": 3,
            "ema": {"profile": "constant", "decay": 0.9},
        },
        "sampling": {"steps": 2, "columns": 2, "rows": 1},
        "deepspeed": {"zero_optimization": {"stage": 1}},
    }  # fmt: skip
    config = check_config(tree)
    tree["denoiser"]["weights"] = str(random_weights(build_denoiser(config, CLASSES), folder / "denoiser.pt"))
    tree["structure_encoder"]["weights"] = str(random_weights(build_psi(config), folder / "psi.pth"))
    return tree


def average(run: Path, step: int) -> dict[str, Tensor]:
    return load_file(run / f"checkpoints/step-{step:06d}/ema.safetensors")


@pytest.mark.slow
def test_the_denoiser_rests_while_the_discriminator_warms_up_and_a_resumed_run_is_the_same(tmp_path: Path) -> None:
    tree = digits(tmp_path)
    (tmp_path / "x.json").write_text(json.dumps(tree))
    run, again = tmp_path / "run", tmp_path / "again"
    train_here("--config", str(tmp_path / "x.json"), "--run-dir", str(run))

    start = torch.load(tree["denoiser"]["weights"], weights_only=True)
    rested, moved = average(run, 3), average(run, 5)
    assert rested.keys() <= start.keys() and all(torch.equal(rested[name], start[name]) for name in rested)
    assert any(not torch.equal(moved[name], start[name]) for name in moved)
    log = lines(run / "metrics.jsonl")
    assert [line["lr"] for line in log] == pytest.approx([0, 0, 0, 5e-4, 1e-3])
    assert all(line["lr_discriminator"] == 1e-3 and line["grad_norm_discriminator"] > 0 for line in log)
    # Psi has learned meanwhile: S of the same denoiser is no longer what it was.
    assert len({line["structure_distance"] for line in log[:3]}) == 3

    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoints/step-000005")
    train_here("--config", str(tmp_path / "x.json"), "--run-dir", str(again))
    assert_same_state(run / "checkpoints/step-000005", again / "checkpoints/step-000005")


@pytest.mark.slow
def test_the_example_plays_on_the_pixels_of_decoded_latents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SADM_CACHE", str(tmp_path / "cache"))
    some_images(tmp_path / "images")
    autoencoder = save_autoencoder(
        tmp_path / "autoencoder",
        block_out_channels=(4, 4, 4, 4),
        norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    shorter = [
        override for override in NARROWER if not override.startswith(("structure_encoder", "game.start", "data.res"))
    ]
    overrides = [
        *shorter, f"data.path={tmp_path / 'latents'}", f"latents.autoencoder={autoencoder}", "data.resolution=64",
        f"latents.images={tmp_path / 'images'}", "latents.batch=4", "train.compile=off",
        "game.warmup_steps=1", "train.steps=2", "train.log_every=1",
    ]  # fmt: skip
    config = load_config(POSTTRAIN, overrides)
    overrides += [
        f"denoiser.weights={random_weights(build_denoiser(config, 1000), tmp_path / 'denoiser.pt')}",
        f"structure_encoder.weights={random_weights(build_psi(config), tmp_path / 'psi.pth')}",
    ]
    arguments = ["--config", str(POSTTRAIN), *(part for override in overrides for part in ("--set", override))]
    assert encode.main(arguments) == 0
    run = tmp_path / "run"
    train_here(*arguments, "--run-dir", str(run))
    first, second = lines(run / "metrics.jsonl")
    assert first["lr"] == 0 < second["lr"]
    assert second["structure_distance"] > 0 and first["grad_norm_discriminator"] > 0
    assert (run / "relations/step-000002.npz").exists()


def test_the_example_is_a_gentle_end_of_a_training() -> None:
    config = load_config(POSTTRAIN)
    assert config.denoiser.weights is not None and config.denoiser.weights.endswith(".pt")
    assert config.psi_shape == (3, 256, 256) and config.discriminator_optimizer.betas[0] == 0.0
    assert config.denoiser_optimizer.lr <= 1e-5 and config.game.warmup_steps > 0 and config.game.start_step == 0


def rates(config: Config, steps: int) -> list[float]:
    """The denoiser's learning rates, in units of the configured one."""
    players = Players.__new__(Players)
    players.config, players.denoiser, players.discriminator = config, "an engine", "another"
    return [players.learning_rates(step)["denoiser"] / config.denoiser_optimizer.lr for step in range(steps)]


def test_the_denoiser_s_own_warm_up_begins_when_it_begins_to_learn(tmp_path: Path) -> None:
    tree = digits(tmp_path)
    tree["train"]["steps"] = 100
    assert rates(check_config(tree), 6) == [0.0, 0.0, 0.0, 0.5, 1.0, 1.0]
    tree["game"]["start_step"] = 2  # it has learned before
    assert rates(check_config(tree), 7) == [0.5, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0]
