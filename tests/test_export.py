"""export.py: official weights through every form and back, with equal samples."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sadm_fast import diffusion, export, sample
from sadm_fast.build import build_denoiser
from sadm_fast.config import check_config, load_config
from sadm_fast.diffusion import guided
from sadm_fast.engine.masters import Fragment, trainable_shapes
from sadm_fast.errors import UserError
from sadm_fast.exchange.reading import read_weights
from sadm_fast.exchange.starting import starting_facts
from sadm_fast.generation import generate, load_alone, load_trained, to_images
from sadm_fast.run.checkpoint_writer import CheckpointWriter
from sadm_fast.run.folder import RunFolder
from sadm_fast.run.manifest import EMA_FILE
from sadm_fast.run.state import TrainState
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
    options = {"guidance_scale": 1.5, "num_inference_steps": 50, "output_type": "np"}
    found = pipeline([0, 4], generator=torch.Generator().manual_seed(0), **options).images
    trained = load_alone(load_config(config, [f"denoiser.weights={official}"]), CPU)
    process, labels = trained.config.process, torch.tensor([0, 4])
    noise = torch.randn(2, *trained.config.sample_shape, generator=torch.Generator().manual_seed(0))
    latents = diffusion.sample(process, guided(process, trained.model, labels, CLASSES, 1.5), noise, "ddim50", "ddim")
    wanted = (to_images(latents, trained.autoencoder(CPU)) / 2 + 0.5).clamp(0, 1)
    # As the latents in test_diffusers.py; the images' own spread is about 0.16.
    assert found == pytest.approx(wanted.permute(0, 2, 3, 1).numpy(), abs=1e-5)


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


@pytest.fixture
def difffit_run(tmp_path: Path) -> Path:
    """The folder of a run that DiffFit has put on tmp_path/base.safetensors, of another number of classes."""
    tree: dict[str, Any] = {
        "name": "tiny",
        "data": {"resolution": 8, "channels": 1},
        "denoiser": {"hidden_size": 16, "depth": 2, "num_heads": 2, "num_classes": 3},
        "sampling": {"steps": 2},
    }
    base = build_denoiser(check_config(tree), 7)
    tree["denoiser"] |= {"train": "difffit", "weights": str(tmp_path / "base.safetensors")}
    config = check_config(tree)
    tuned = build_denoiser(config, 3)
    generator = torch.Generator().manual_seed(0)
    for parameter in [*base.parameters(), *tuned.parameters()]:
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    folder = RunFolder(tmp_path / "run")
    folder.claim(config)
    folder.facts.write_text(json.dumps({"classes": ["a", "b", "c"]}))
    average = [Fragment(n, 0, p.detach().flatten()) for n, p in tuned.named_parameters() if p.requires_grad]
    starting = starting_facts(config)
    writer = CheckpointWriter(
        folder.checkpoints, {}, {EMA_FILE: lambda: average}, trainable_shapes(tuned), metadata=starting,
        identity={"starting_weights": starting["starting_weights_sha256"]}, keep_last=1, say=print,
    )  # fmt: skip
    writer.save(TrainState(step=10, ema_updates=10))
    writer.finish()
    writer.close()
    return folder.path


def of_weights(folder: Path, name: str) -> Tensor:
    """Samples of exported weights."""
    config = load_config(folder / "sadm_fast.json", [f"denoiser.weights={folder / name}"])
    return load_alone(config, CPU).sample([0, 1, 2])


def test_what_difffit_has_trained_is_exported_merged_or_apart(difffit_run: Path, tmp_path: Path) -> None:
    wanted = load_trained(difffit_run, CPU, print).sample([0, 1, 2])
    for options, form in (([], "safetensors"), ([], "dit"), (["--apart"], "safetensors")):
        out = tmp_path / "-".join(["out", form, *options])
        assert export.main([str(difffit_run), "--to", form, *options, "--out", str(out)]) == 0
        name = "model.pt" if form == "dit" else "model.safetensors"
        # Samples of order 1 through two blocks, whose weights were rounded once more, in fp32.
        torch.testing.assert_close(of_weights(out, name), wanted, rtol=1e-4, atol=1e-4)
        assert '"starting_weights": "' in (out / "README.md").read_text()
        state = {} if form == "dit" else load_file(out / name)
        frozen = [name for name in state if name.endswith("weight") and "table" not in name]
        assert bool(frozen) == (form == "safetensors" and not options)
    # A run's folder is weights to start from, too: merged.
    there, merged = read_weights("x", difffit_run), load_file(tmp_path / "out-safetensors/model.safetensors")
    assert all(torch.equal(there[name], value) for name, value in merged.items())
    assert export.main([str(finished_run(tmp_path / "x")), "--to", "safetensors", "--apart", "--out", "y"]) == 2


def test_starting_weights_that_are_gone_or_others_are_named(difffit_run: Path, tmp_path: Path) -> None:
    base = tmp_path / "base.safetensors"
    moved = base.rename(tmp_path / "moved.safetensors")
    with pytest.raises(UserError, match=f"^denoiser.weights={base}: there is no such file"):
        load_trained(difffit_run, CPU, print)
    with pytest.raises(UserError, match="DiffFit trained it on .*base.safetensors, which is not there; put it there"):
        read_weights("x", difffit_run)
    load_trained(difffit_run, CPU, print, [f"denoiser.weights={moved}"])
    save_file({name: value + 1 for name, value in load_file(moved).items()}, base)
    with pytest.raises(UserError, match="base.safetensors: is not what .*step-000010 was trained on; its sha256 is"):
        load_trained(difffit_run, CPU, print)
    with pytest.raises(UserError, match="DiffFit trained it on other weights than .*base.safetensors holds now"):
        read_weights("x", difffit_run)
    beside = load_trained(difffit_run, CPU, print, [f"denoiser.weights={moved}"]).checkpoint / base.name
    base.unlink()
    moved.rename(beside)
    assert "blocks.0.mlp.fc1.weight" in read_weights("x", difffit_run)
