"""Every configuration against a tiny stand-in of the dataset that it is for, laid out as docs/data.md says."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sadm_fast import encode
from sadm_fast.build import build_denoiser, build_psi, resolve_classes
from sadm_fast.config import Config, load_config
from sadm_fast.config_training import ExponentialEMA
from sadm_fast.console import Console
from sadm_fast.data.image_folder import ImageFolder
from sadm_fast.data.source import ImageSource
from sadm_fast.feed import load_samples, open_data, open_images_to_encode
from sadm_fast.generation import load_trained
from sadm_fast.train import main
from tests.data.loaders import open_feed
from tests.support.autoencoders import save_autoencoder
from tests.support.programs import train_here

ROOT = Path(__file__).resolve().parent.parent
FILES = {
    path.stem: path
    for folder in (ROOT / "configs", ROOT / "configs/finetune")
    for path in sorted(folder.glob("*.json"))
    if path.stem != "schema"
}
CONFIGS = sorted(FILES)


class Layout(NamedTuple):
    """Where a dataset lies, how two of its files are called, and what its authors say of it."""

    root: str
    files: tuple[str, ...]  # one of each of two classes, or two of the only one
    size: tuple[int, int]  # a usual image: width, height
    classes: int


def _folder(name: str, *files: str, size: tuple[int, int], classes: int) -> Layout:
    return Layout(f"datasets/{name}/train", files, size, classes)


IMAGENET = _folder(
    "imagenet",
    "n01440764/n01440764_10026.JPEG", "n01443537/n01443537_10007.JPEG",
    size=(500, 375), classes=1000,
)  # fmt: skip
LAYOUTS = {
    "imagenet256": IMAGENET,
    "imagenet256_posttrain": IMAGENET,
    "imagenet512": IMAGENET,
    "cifar10": _folder("cifar10", "airplane/00029.png", "truck/00001.png", size=(32, 32), classes=10),
    "cifar10_unconditional": _folder(
        "cifar10-unconditional", "all/00000.png", "all/00001.png", size=(32, 32), classes=1
    ),
    "celeba64": _folder("celeba", "faces/000001.jpg", "faces/000002.jpg", size=(178, 218), classes=1),
    "ffhq64": _folder("ffhq", "faces/00000.png", "faces/00001.png", size=(1024, 1024), classes=1),
    "flowers102": _folder("flowers102", "001/image_06734.jpg", "077/image_00001.jpg", size=(591, 500), classes=102),
    "cub200": _folder(
        "cub200",
        "001.Black_footed_Albatross/Black_Footed_Albatross_0001_796111.jpg",
        "002.Laysan_Albatross/Laysan_Albatross_0001_545.jpg",
        size=(500, 335),
        classes=200,
    ),  # fmt: skip
    "food101": _folder("food101", "apple_pie/1005649.jpg", "waffles/971843.jpg", size=(512, 384), classes=101),
    "sun397": _folder(
        "sun397",
        "abbey/sun_aaalbzqrimafwbiv.jpg",
        "church-indoor/sun_aacmtgkkogdpxzik.jpg",
        size=(300, 225),
        classes=397,
    ),  # fmt: skip
    "dfungi20m": _folder(
        "dfungi20m", "0/2237851949-74654.JPG", "181/2238546328-30620.JPG", size=(400, 300), classes=182
    ),
    "caltech101": _folder(
        "caltech101", "accordion/image_0001.jpg", "yin_yang/image_0001.jpg", size=(300, 200), classes=101
    ),
    "artbench10": _folder(
        "artbench10",
        "art_nouveau/a-y-jackson_algoma-in-november-1935.jpg",
        "ukiyo_e/utagawa-kuniyoshi_a-boy.jpg",
        size=(256, 256),
        classes=10,
    ),  # fmt: skip
    "stanford_cars": _folder("stanford_cars", "001/00198.jpg", "196/08144.jpg", size=(600, 400), classes=196),
    "mnist": Layout("demo:mnist5k", ("0/0000.png", "9/4999.png"), (28, 28), 10),
}
FINETUNED = (
    "flowers102", "cub200", "food101", "sun397", "dfungi20m", "caltech101", "artbench10", "stanford_cars",
)  # fmt: skip
WAYS = ("finetune", "finetune_difffit")
for _name in FINETUNED:
    LAYOUTS |= dict.fromkeys([f"{_name}_{way}" for way in WAYS], LAYOUTS.pop(_name))


def _write_stand_in(layout: Layout, folder: Path) -> Path:
    """The two files and a third one that is taller than wide, or square."""
    root = folder / layout.root.replace(":", "-")
    width, height = layout.size
    third = str(Path(layout.files[1]).with_stem("another"))
    for number, (name, size) in enumerate([(name, layout.size) for name in layout.files] + [(third, (height, width))]):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return root


def _load(name: str, images: Path) -> Config:
    """The configuration, its images at `images`, on a machine with two cores."""
    file = FILES[name]
    path = "latents.images" if "latents" in json.loads(file.read_text()) else "data.path"
    return load_config(file, [f"{path}={images}", "data.threads=1", "data.loader=torch"])


def _open(config: Config) -> ImageSource:
    """The images, checked as `train.py` or, for cached latents, `encode.py` checks them."""
    console = Console(rank=1)
    source = open_data(config, console) if config.latents is None else open_images_to_encode(config, console)
    assert isinstance(source, ImageFolder)
    return source


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SADM_CACHE", str(tmp_path / "cache"))


def test_every_configuration_has_a_layout() -> None:
    assert set(CONFIGS) == set(LAYOUTS), "a configuration without a layout, or the other way round"


@pytest.mark.parametrize("name", CONFIGS)
def test_the_configuration_points_to_the_documented_place(name: str) -> None:
    config = load_config(FILES[name])
    assert config.name == name
    images = config.data.path if config.latents is None else config.latents.images
    assert images == LAYOUTS[name].root


@pytest.mark.parametrize("name", CONFIGS)
def test_the_stand_in_is_listed_checked_and_cropped(name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    config = _load(name, _write_stand_in(layout, tmp_path))
    source = _open(config)
    assert len(source) == 3
    assert source.classes == tuple(sorted({Path(file).parts[0] for file in layout.files}))
    assert resolve_classes(config, source) >= 1 + source.labels.max()
    assert config.denoiser.num_classes in (None, layout.classes)
    pixels = config.model_copy(update={"latents": None})
    crops = load_samples(pixels, source, range(3))
    assert crops.shape == (3, config.data.channels, config.data.resolution, config.data.resolution)


@pytest.mark.parametrize("name", ["imagenet256", "imagenet512", "cifar10", "celeba64"])
def test_the_denoiser_fits_the_samples(name: str) -> None:
    config = load_config(FILES[name])
    classes = LAYOUTS[name].classes
    with torch.device("meta"):
        denoiser = build_denoiser(config, classes)
        sample = torch.empty(2, *config.sample_shape)
        out = denoiser(sample, torch.zeros(2), torch.zeros(2, dtype=torch.long))
    assert out.shape == (2, config.process.output_channels(config.sample_shape[0]), *config.sample_shape[1:])


@pytest.mark.parametrize("name", ["cifar10", "celeba64"])
def test_pixels_are_trained_on_from_the_stand_in(name: str, tmp_path: Path) -> None:
    config = _load(name, _write_stand_in(LAYOUTS[name], tmp_path))
    with open_feed(config, _open(config), micro_batch=2) as feed:
        batch = next(feed)
    assert batch.images.shape == (2, *config.sample_shape)
    assert int(batch.labels.max()) < LAYOUTS[name].classes


# docs/data.md


def _documentation() -> str:
    return (ROOT / "docs/data.md").read_text()


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "mnist"])
def test_the_dataset_is_documented_as_its_layout_says(name: str) -> None:
    layout, text = LAYOUTS[name], _documentation()
    assert f"`{FILES[name].relative_to(ROOT)}`" in text
    example = f"{layout.root}/{layout.files[0]}"
    assert example in text
    line = next(line for line in text.splitlines() if example in line)
    assert re.search(rf"\b{layout.classes:,}\b", line), f"{layout.classes} classes"


def _python_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", _documentation(), flags=re.MULTILINE | re.DOTALL)


def test_every_python_block_compiles() -> None:
    blocks = _python_blocks()
    assert blocks
    for block in blocks:
        compile(block, "docs/data.md", "exec")


def test_the_cifar_block_turns_the_binary_version_into_both_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    binary = tmp_path / "cifar-10-batches-bin"
    binary.mkdir()
    rng = np.random.default_rng(0)
    labels, pixels = (
        rng.integers(0, 10, (5, 4), dtype=np.uint8),
        rng.integers(0, 256, (5, 4, 3, 32, 32), dtype=np.uint8),
    )
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (binary / "batches.meta.txt").write_text("\n".join([*names, "", ""]))
    for part in range(5):
        records = np.concatenate([labels[part, :, None], pixels[part].reshape(4, -1)], axis=1)
        (binary / f"data_batch_{part + 1}.bin").write_bytes(records.tobytes())
    (block,) = [block for block in _python_blocks() if "data_batch" in block]
    exec(compile(block, "docs/data.md", "exec"), {})
    for name in ("cifar10", "cifar10_unconditional"):
        folder = ImageFolder.scan(tmp_path / LAYOUTS[name].root)
        assert len(folder) == 20
        for index in range(20):
            part, number = divmod(int(Path(folder.path(index)).stem), 4)
            if name == "cifar10":
                assert folder.classes[folder.labels[index]] == names[labels[part, number]]
            with Image.open(folder.path(index)) as image:
                np.testing.assert_array_equal(np.asarray(image).transpose(2, 0, 1), pixels[part, number])


def _set(changes: dict[str, Any]) -> list[str]:
    return [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]


def _planned_and_trained(name: str, run: Path, changes: dict[str, Any], planned: bool = True) -> None:
    command = ["--config", str(FILES[name]), "--run-dir", str(run), *_set(changes)]
    if planned:
        train_here(*command, "--dry-run")
    with mock.patch("sadm_fast.trainer.write_report"):  # its pictures would take most of the time
        train_here(*command)


# What makes it seconds instead of days: narrower, shorter, fewer.
NARROWER = {
    "denoiser.channels": 8, "denoiser.depth": 1, "structure_encoder.architecture": "cnn", "train.micro_batch": 2,
    "train.steps": 2, "game.start_step": 1, "sampling.steps": 1, "sampling.columns": 1, "sampling.rows": 1,
}  # fmt: skip
U_NETS = ("cifar10", "cifar10_unconditional", "celeba64", "ffhq64")


@pytest.mark.parametrize("name", U_NETS)
def test_pixels_have_edms_network_and_settings(name: str) -> None:
    config = load_config(FILES[name])
    denoiser, optimizer, ranks = config.denoiser, config.denoiser_optimizer, 8
    assert denoiser.architecture == "unet" and not config.data.flip  # its augmentation mirrors
    assert denoiser.conditional == (name == "cifar10") and denoiser.label_dropout == 0.0
    batch = ranks * config.train.micro_batch * config.train.grad_accumulation
    faces = name in ("celeba64", "ffhq64")  # EDM has no CelebA: FFHQ's
    # Karras et al. 2022, table 7 and the README of the release.
    assert batch == (256 if faces else 512)
    assert denoiser.channel_multipliers == ((1, 2, 2, 2) if faces else (2, 2, 2)) and denoiser.channels == 128
    assert (denoiser.depth, denoiser.attention_resolutions) == (4, (16,))
    assert (denoiser.dropout, denoiser.augment) == ((0.05, 0.15) if faces else (0.13, 0.12))
    assert (optimizer.lr, optimizer.betas) == (2e-4 if faces else 1e-3, (0.9, 0.999))
    assert optimizer.warmup_steps == int(10e6) // batch and config.train.steps == int(200e6) // batch
    assert isinstance(config.train.ema, ExponentialEMA)
    assert config.train.ema.decay == pytest.approx(0.5 ** (batch / 0.5e6), abs=1e-6)
    assert config.sampling.steps == (40 if faces else 18)


@pytest.mark.slow
@pytest.mark.parametrize(
    "names", [("cifar10", "ffhq64"), pytest.param(("cifar10_unconditional", "celeba64"), marks=pytest.mark.soak)]
)
def test_u_nets_train_two_steps_on_the_stand_ins(names: tuple[str, ...], tmp_path: Path) -> None:
    for name in names:
        images = _write_stand_in(LAYOUTS[name], tmp_path / name)
        config = _load(name, images)
        psi = tmp_path / name / "psi.safetensors"
        narrow = config.structure_encoder.model_copy(update={"architecture": "cnn"})
        save_file(build_psi(config.model_copy(update={"structure_encoder": narrow})).state_dict(), psi)
        changes = {**NARROWER, "structure_encoder.weights": psi, "data.path": images, "data.threads": 1}
        run = tmp_path / f"run-{name}"
        _planned_and_trained(name, run, changes)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert lines[-1]["step"] == 2 and lines[-1]["skipped_steps"] == 0 and lines[-1]["structure_distance"] > 0
        average = load_file(run / "checkpoints/step-000002/ema.safetensors")
        assert ("label_embedding.weight" in average) == (name == "cifar10")
        assert "augment_embedding.weight" in average


# Fine-tuning


def test_every_set_is_fine_tuned_in_both_ways_with_the_same_settings() -> None:
    for name in FINETUNED:
        full, difffit = (load_config(FILES[f"{name}_{way}"]) for way in WAYS)
        assert full.denoiser.name == "DiT-XL/2" and full.denoiser.weights == "weights/DiT-XL-2-256x256.pt"
        assert full.denoiser_optimizer.lr == 1e-4 and difffit.denoiser_optimizer.lr == 1e-3
        denoiser = full.denoiser.model_copy(update={"train": "difffit"})
        optimizer = full.denoiser_optimizer.model_copy(update={"lr": 1e-3})
        update = {"name": difffit.name, "denoiser": denoiser, "denoiser_optimizer": optimizer}
        assert full.model_copy(update=update) == difffit


SHORTER = {
    "data.resolution": 64, "data.threads": 1, "denoiser.name": "null", "denoiser.patch_size": 2,
    "denoiser.hidden_size": 32, "denoiser.depth": 1, "denoiser.num_heads": 2, "structure_encoder.architecture": "cnn",
    "train.micro_batch": 2, "train.steps": 2, "game.start_step": 1, "sampling.steps": 1, "sampling.columns": 1,
    "sampling.rows": 1, "latents.batch": 4,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "names", [FINETUNED[:1], pytest.param(FINETUNED[1:], marks=pytest.mark.soak)], ids=["flowers102", "the others"]
)
def test_fine_tuning_takes_two_steps_on_the_stand_ins_and_goes_on(
    names: tuple[str, ...], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    autoencoder = save_autoencoder(
        tmp_path / "vae",
        block_out_channels=(4, 4, 4, 4),
        norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    changes: dict[str, Any] = SHORTER | {"latents.autoencoder": autoencoder}
    for part in ("denoiser", "structure_encoder"):
        changes[f"{part}.weights"] = tmp_path / f"{part}.safetensors"
    narrow = load_config(FILES[f"{names[0]}_finetune"], _set(changes)[1::2])
    started = build_denoiser(narrow, 5)
    with torch.no_grad():
        for parameter in started.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05 * parameter.requires_grad)
    save_file(started.state_dict(), changes["denoiser.weights"])
    save_file(build_psi(narrow).state_dict(), changes["structure_encoder.weights"])
    for name in names:
        own = changes | {
            "latents.images": _write_stand_in(LAYOUTS[f"{name}_finetune"], tmp_path / name),
            "data.path": tmp_path / name / "latents",
        }
        assert encode.main(["--config", str(FILES[f"{name}_finetune"]), *_set(own)]) == 0
        for way, steps in zip(WAYS, (2, 3), strict=True):
            run = tmp_path / f"{name}_{way}"
            _planned_and_trained(run.name, run, own)
            if steps == 3:
                _planned_and_trained(run.name, run, own | {"train.steps": 3}, planned=False)
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            assert lines[-1]["step"] == steps and lines[-1]["skipped_steps"] == 0
            assert lines[-1]["structure_distance"] > 0
            average = load_file(run / f"checkpoints/step-00000{steps}/ema.safetensors")
            assert len(average["y_embedder.embedding_table.weight"]) == LAYOUTS[run.name].classes + 1
            frozen = {key for key in started.state_dict() if key.endswith("weight") and "table" not in key}
            assert frozen <= average.keys() if way == "finetune" else not frozen & average.keys()
        trained = load_trained(run, torch.device("cpu"), print)
        kept = trained.model.state_dict()
        assert all(torch.equal(kept[key], started.state_dict()[key]) for key in frozen)
        assert all(torch.equal(kept[key], average[key]) for key in average)
        assert not torch.equal(kept["blocks.0.mlp.gamma"], torch.ones(128))
    save_file({key: value + 1 for key, value in started.state_dict().items()}, changes["denoiser.weights"])
    command = ["--config", str(FILES[run.name]), "--run-dir", str(run), *_set(own | {"train.steps": 4})]
    assert main(command) == 2
    said = capfd.readouterr().err
    assert f"step-000003: starting_weights are not those of denoiser.weights={tmp_path}" in said
