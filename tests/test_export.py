"""export.py: official weights through every form and back, with equal samples."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sadm_fast import export, sample
from sadm_fast.build import build_denoiser
from sadm_fast.config import check_config, load_config
from sadm_fast.generation import generate, load_alone
from tests.support.autoencoders import save_autoencoder
from tests.support.finished_run import finished_run

CLASSES = 5
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("official")
    tree = {
        "name": "tiny",
        "data": {"source": "latents", "path": "nowhere", "resolution": 16, "channels": 3},
        "latents": {"autoencoder": str(save_autoencoder(root / "vae")), "downsample": 2},
        "diffusion": {"process": "vp", "learn_sigma": True},
        "denoiser": {"patch_size": 2, "hidden_size": 32, "depth": 2, "num_heads": 2},
        "sampling": {"steps": "ddim50", "guidance_scale": 1.5},
    }
    (root / "tiny.json").write_text(json.dumps(tree))
    return root / "tiny.json"


@pytest.fixture(scope="module")
def official(config: Path) -> Path:
    """A checkpoint as DiT's train.py writes it, with random weights."""
    state = build_denoiser(load_config(config), CLASSES).state_dict()
    generator = torch.Generator().manual_seed(0)
    ema = {
        name: value if name == "pos_embed" else torch.randn(value.shape, generator=generator) * 0.1
        for name, value in state.items()
    }
    content = {"model": state, "ema": ema, "opt": {}, "args": argparse.Namespace(model="DiT-XL/2")}
    torch.save(content, config.parent / "0400000.pt")
    return config.parent / "0400000.pt"


def drawn(config: Path, weights: Path) -> Tensor:
    """Latents of the denoiser in `weights`."""
    trained = load_alone(load_config(config, [f"denoiser.weights={weights}"]), CPU)
    ids = torch.arange(3)
    return generate(trained.config, trained.model, ids, ids, steps="ddim50", guidance_scale=1.5)


@pytest.mark.parametrize(
    ("options", "read"),
    [
        (["--to", "safetensors"], "model.safetensors"),
        (["--to", "dit"], "model.pt"),
        (["--to", "diffusers", "--steps", "0"], ""),
        (["--to", "diffusers"], ""),
    ],
    ids=["safetensors", "dit", "diffusers", "diffusers fitted"],
)
def test_official_weights_go_out_and_back_with_equal_samples(
    config: Path, official: Path, tmp_path: Path, options: list[str], read: str
) -> None:
    out = tmp_path / "out"
    assert export.main(["--weights", str(official), "--config", str(config), *options, "--out", str(out)]) == 0
    wanted, found = drawn(config, official), drawn(out / "sadm_fast.json", out / read)
    if options == ["--to", "diffusers"]:  # fitted and back: one matrix is rounded twice
        assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    else:
        assert torch.equal(found, wanted)
    card = (out / "README.md").read_text()
    assert {path.stat().st_mode for path in out.rglob("*") if path.is_file()} == {(out / "README.md").stat().st_mode}
    assert '"sha256": "' in card and "None of this step." in card and str(tmp_path) not in card
    assert ("**Only with\n50 steps of DDIM**" in card) == (options == ["--to", "diffusers"])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_exported_pipeline_is_whole_and_its_images_are_ours(config: Path, official: Path, tmp_path: Path) -> None:
    from diffusers import DiTPipeline

    arguments = ["--weights", str(official), "--config", str(config), "--to", "diffusers", "--out", str(tmp_path / "x")]
    assert export.main(arguments) == 0
    pipeline = DiTPipeline.from_pretrained(tmp_path / "x", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    grid = tmp_path / "x.png"
    picture = ["--weights", str(tmp_path / "x"), "--config", str(config), "--autoencoder", str(tmp_path / "x/vae")]
    assert sample.main([*picture, "--count", "4", "--out", str(grid)]) == 0 and grid.exists()
    images = pipeline([0, 4], num_inference_steps=50, generator=torch.Generator().manual_seed(0), output_type="np")
    assert images.images.shape == (2, 16, 16, 3)


def changed(config: Path, official: Path, tmp_path: Path, **blocks: Any) -> list[str]:
    """Arguments for weights that fit the configuration with other blocks."""
    tree = json.loads(config.read_text())
    for name, block in blocks.items():
        tree[name] = block if block is None else tree.get(name, {}) | block if "process" not in block else block
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(tree))
    state = build_denoiser(check_config(tree), CLASSES).state_dict()
    torch.save(state, tmp_path / "changed.pt")
    return ["--weights", str(tmp_path / "changed.pt"), "--config", str(path), "--out", str(tmp_path / "x")]


@pytest.mark.parametrize(
    ("blocks", "options", "said"),
    [
        ({"diffusion": {"process": "flow"}, "sampling": {"steps": 5}}, [], "samples vp, and this is diffusion.process"),
        ({"denoiser": {"position_grid": 8}}, [], "no stretched positions"),
        ({}, ["--steps", "18"], "--steps 18: must be one of 1, 2, 4, 5, 8, 10, 20, 25, 40, 50, or 0"),
    ],
)
def test_what_diffusers_cannot_draw_is_refused_in_one_line(
    config: Path,
    official: Path,
    tmp_path: Path,
    blocks: dict[str, Any],
    options: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert export.main([*changed(config, official, tmp_path, **blocks), "--to", "diffusers", *options]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (tmp_path / "x").exists()


def test_a_run_is_exported_with_its_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished_run(tmp_path)
    lines = [
        {"step": 5, "fid_pixels": 9.0},
        {"step": 10, "samples": 12, "fid_pixels": 3.25, "floor": {"fid_pixels": 1}},
    ]
    (run / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "out"
    assert export.main([str(run), "--to", "safetensors", "--out", str(out)]) == 0
    card = (out / "README.md").read_text()
    assert "| fid_pixels | 3.25 | 1 |" in card and '"file": "step-000010"' in card and str(tmp_path) not in card
    assert export.main([str(run), "--to", "safetensors", "--out", str(out)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert export.main([str(run), "--to", "diffusers", "--out", str(tmp_path / "y")]) == 2
    assert "this denoiser paints pixels; use --to safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["run", "--weights", "x"], ["--weights", "x"], ["run", "--config", "c"]])
def test_one_model_must_be_named(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert export.main([*arguments, "--to", "dit", "--out", "x"]) == 2
    assert "error: " in capsys.readouterr().err
