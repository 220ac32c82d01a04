"""encode.py as a person starts it: images become latents, once, whole, and the same bytes whoever makes them."""

import errno
import json
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sadm_fast import encode
from sadm_fast.data.adm_crop import read_crop
from sadm_fast.data.batch import stack_crops
from sadm_fast.data.latents import LatentCache
from sadm_fast.models.autoencoder import Autoencoder
from sadm_fast.scales import pixels_to_float
from tests.support.autoencoders import save_autoencoder
from tests.support.programs import Program, start_line, tree
from tests.support.ranks import ROOT, run_ranks
from tests.test_files import held_by_another_process

SCRIPT = ROOT / "sadm_fast" / "encode.py"
CLASSES = ("circle", "square", "triangle")
IMAGES = 7  # of each class
SHARDS = 6  # of four images: the last one is short


def write_images(root: Path) -> Path:
    """root/class/N.png: colour noise of several sizes, none smaller than 16 pixels."""
    rng = np.random.default_rng(0)
    for name in CLASSES:
        (root / name).mkdir(parents=True)
        for i in range(IMAGES):
            pixels = rng.integers(0, 256, (16 + 5 * i, 23, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_autoencoder(tmp_path_factory.mktemp("autoencoder") / "small")


@pytest.fixture
def config(tmp_path: Path, autoencoder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration that encodes images of its own into `latents` beside it."""
    monkeypatch.setenv("SADM_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "latents.json"
    tiny = {
        "name": "latents",
        "data": {"source": "latents", "path": str(tmp_path / "latents"), "resolution": 16, "channels": 3, "threads": 1},
        "latents": {
            "autoencoder": str(autoencoder),
            "downsample": 2,
            "images": str(write_images(tmp_path / "images")),
            "shard_size": 4,
            "batch": 3,
        },
        "denoiser": {"patch_size": 2, "hidden_size": 16, "depth": 1, "num_heads": 2},
    }
    path.write_text(json.dumps(tiny))
    return path


def arguments(config: Path, *overrides: str) -> list[str]:
    return ["--config", str(config), *(part for override in overrides for part in ("--set", override))]


def encoded(config: Path, *overrides: str) -> dict[str, bytes]:
    """Every file of the cache that `encode.py` makes."""
    assert encode.main(arguments(config, *overrides)) == 0
    return tree(config.parent / "latents")


def refusal(config: Path, capfd: pytest.CaptureFixture[str], *overrides: str) -> str:
    capfd.readouterr()
    assert encode.main(arguments(config, *overrides)) == 2
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err and err.count("\n") == 1 and err.startswith("error: "), err
    return err


def test_the_cache_holds_the_posterior_of_every_image_and_of_its_mirror_image(config: Path, autoencoder: Path) -> None:
    encoded(config, "latents.dtype=float32")
    source = LatentCache.open(config.parent / "latents")
    assert len(source) == 21 and source.classes == CLASSES
    assert source.labels.tolist() == [0] * 7 + [1] * 7 + [2] * 7
    crops = [read_crop(str(path), 16, 3) for path in sorted((config.parent / "images").rglob("*.png"))]
    images = pixels_to_float(stack_crops(crops))
    model = Autoencoder.load(str(autoencoder))
    for mirror, seen in ((False, images), (True, images.flip(-1))):
        out = source.buffer(21)
        source.read(np.arange(21), np.full(21, mirror), out)
        posterior = model.encode(seen)
        # batches of another size may be summed in another order
        torch.testing.assert_close(torch.from_numpy(out[:, 0]), posterior.mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.from_numpy(out[:, 1]), posterior.std, rtol=1e-5, atol=1e-5)
    assert source.encoding.space == model.space


@pytest.mark.filterwarnings("error")
def test_latents_that_the_cached_dtype_cannot_hold_are_one_line_with_image_and_dtype(
    config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    unusual = save_autoencoder(tmp_path / "unusual")
    weights = load_file(unusual / "diffusion_pytorch_model.safetensors")
    weights["quant_conv.bias"][1] = 70000.0  # the mean of one channel
    save_file(weights, unusual / "diffusion_pytorch_model.safetensors")
    here = f"latents.autoencoder={unusual}"
    message = refusal(config, capfd, here)
    assert "circle/0.png: its latents reach 7e+04, and latents.dtype=float16 ends at 65504" in message
    assert encode.main(arguments(config, here, "latents.dtype=float32")) == 0  # as it says, into the same folder


def test_the_manifest_says_what_was_made_of_what(config: Path) -> None:
    manifest = json.loads(encoded(config)["manifest.json"])
    assert manifest["count"] == 21 and len(manifest["shards"]) == SHARDS
    assert [shard["count"] for shard in manifest["shards"]] == [4, 4, 4, 4, 4, 1]
    encoding = manifest["encoding"]
    assert (encoding["scale"], encoding["shift"], encoding["pixel_range"]) == (0.5, 0.0, [-1.0, 1.0])
    assert (encoding["dtype"], encoding["resolution"], encoding["downsample"]) == ("float16", 16, 2)


def test_a_tilde_is_the_home_folder_wherever_a_path_is_given(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autoencoder: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(config.parent)
    (tmp_path / "vae").symlink_to(autoencoder)
    homes = ("data.path=~/home/latents", "latents.images=~/images", "latents.autoencoder=~/vae")
    assert encode.main(arguments(Path("~/latents.json"), *homes)) == 0
    assert len(LatentCache.open("~/home/latents")) == len(LatentCache.open(tmp_path / "home/latents")) == 21
    for path in ("~/home/latents", "~/images"):
        assert encode.main(["--check", path]) == 0
    assert not (tmp_path / "~").exists()


def test_a_complete_cache_is_left_alone(config: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first = encoded(config)
    times = {path: path.stat().st_mtime_ns for path in (config.parent / "latents").rglob("*")}
    assert encoded(config) == first
    assert {path: path.stat().st_mtime_ns for path in (config.parent / "latents").rglob("*")} == times
    assert "complete already" in capfd.readouterr().out


def test_a_second_process_does_not_encode_into_the_same_cache(config: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = config.parent / "latents"
    root.mkdir()
    with held_by_another_process(root) as holder:
        assert f"data.path={root}: process {holder} on " in (said := refusal(config, capfd))
        assert "is encoding into it; wait for its end" in said
    files = encoded(config)
    assert ".lock" not in files
    with held_by_another_process(root):  # which a complete cache does not need
        assert encode.main(arguments(config)) == 0


def test_only_missing_and_torn_shards_are_made_again(config: Path) -> None:
    whole, root = encoded(config), config.parent / "latents"
    (root / "manifest.json").unlink()
    (root / "shards/00001.json").unlink()  # killed between a shard and its record
    (root / "shards/00002.safetensors").unlink()
    torn = root / "shards/00003.safetensors"
    torn.write_bytes(torn.read_bytes()[:100])
    for leftover in ("00004.tmp", "00004.json.tmp", ".tmpv9dCRS"):
        (root / "shards" / leftover).write_bytes(b"half")
    kept = {name: (root / name).stat().st_mtime_ns for name in ("shards/00000.safetensors", "shards/00005.safetensors")}
    assert encoded(config) == whole
    assert {name: (root / name).stat().st_mtime_ns for name in kept} == kept


def test_a_shard_that_was_deleted_is_made_again_though_the_cache_was_complete(config: Path) -> None:
    whole, root = encoded(config), config.parent / "latents"
    (root / "shards/00002.safetensors").unlink()  # as the message about a damaged shard says
    assert encoded(config) == whole


def damage(images: Path) -> None:
    (images / "circle/2.png").write_bytes(b"")
    square = images / "square/0.png"
    square.write_bytes(square.read_bytes()[:200])
    for i in range(IMAGES):  # a whole shard, and a class
        (images / f"triangle/{i}.png").write_text("not an image")


def test_broken_images_are_left_out_and_counted(config: Path, capfd: pytest.CaptureFixture[str]) -> None:
    damage(config.parent / "images")
    manifest = json.loads(encoded(config, "data.broken=skip")["manifest.json"])
    assert "12 images (9 broken ones left out)" in capfd.readouterr().out
    source = LatentCache.open(config.parent / "latents")
    assert manifest["count"] == len(source) == 12 and source.labels.tolist() == [0] * 6 + [1] * 6
    skipped = [problem for shard in manifest["shards"] for problem in shard["skipped"]]
    assert len(skipped) == 9 and "circle/2.png: is an empty file" in skipped[0]
    assert "square/0.png: the image is damaged" in skipped[1]


def test_what_the_loaders_refuse_is_not_encoded(config: Path) -> None:
    path = config.parent / "images/circle/2.png"
    Image.fromarray(np.full((16, 16), 40000, np.uint16)).save(path)
    manifest = json.loads(encoded(config, "data.broken=skip")["manifest.json"])
    (problem,) = [problem for shard in manifest["shards"] for problem in shard["skipped"]]
    assert problem.startswith(f"{path}: ") and "not 8 bits a channel" in problem


def test_broken_images_are_refused_before_the_work(config: Path, capfd: pytest.CaptureFixture[str]) -> None:
    damage(config.parent / "images")
    message = refusal(config, capfd)
    assert "circle/2.png: is an empty file" in message and "8 more" in message and "--check" in message
    assert not (config.parent / "latents").exists()


def other_images(config: Path) -> list[str]:
    encode.main(arguments(config))
    (config.parent / "images/circle/0.png").rename(config.parent / "images/circle/00.png")
    return []


def begun_with(*overrides: str) -> Callable[[Path], list[str]]:
    def begin(config: Path) -> list[str]:
        encode.main(arguments(config, *overrides))
        return []

    return begin


def other_autoencoder(config: Path) -> list[str]:
    encode.main(arguments(config))
    return [f"latents.autoencoder={save_autoencoder(config.parent / 'other', seed=1)}"]


def other_files(config: Path) -> list[str]:
    (config.parent / "latents").mkdir()
    (config.parent / "latents" / "thesis.tex").write_text("years of work")
    return []


def narrow(config: Path) -> list[str]:
    path = save_autoencoder(config.parent / "narrow", latent_channels=3)
    return [f"latents.autoencoder={path}"]


BAD: dict[str, tuple[Callable[[Path], list[str]], list[str]]] = {
    "no images named": (lambda _: ["latents.images=null"], ["latents.images: is null"]),
    "images of another kind": (
        lambda config: ["latents.images_source=webdataset"],
        ["latents.images=", "has no .tar files", "--set latents.images_source=folder"],
    ),
    "no such images": (lambda _: ["latents.images=/nowhere"], ["latents.images=/nowhere: no such folder"]),
    "images are changed": (other_images, ["was begun with another source", "data.path=..."]),
    "another precision": (begun_with("latents.precision=bf16"), ["was begun with another precision"]),
    "another autoencoder": (other_autoencoder, ["was begun with another autoencoder"]),
    "somebody's folder": (other_files, ["holds other files"]),
    "autoencoder of another shape": (narrow, ["latents.channels=4", "has 3"]),
    "grey images": (lambda _: ["data.channels=1"], ["data.channels=1", "has 3"]),
    "other downsampling": (lambda _: ["latents.downsample=4"], ["latents.downsample=4", "has 2"]),
    "no autoencoder": (
        lambda config: [f"latents.autoencoder={config.parent / 'nothing'}"],
        ["latents.autoencoder=", "cannot be loaded"],
    ),
    "under a file": (lambda config: [f"data.path={config}/latents"], ["cannot be prepared"]),
    "not for latents": (lambda _: ["data.source=folder", "latents=null"], ["data.source=folder", "encode.py needs"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_in_one_line(
    config: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    spoil, words = BAD[case]
    overrides = spoil(config)
    before = everything(config.parent / "latents")
    message = refusal(config, capfd, *overrides)
    assert all(word in message for word in words), message
    assert everything(config.parent / "latents") == before


def everything(root: Path) -> tuple[dict[str, bytes], list[str]]:
    """Files with their contents, and names of folders too."""
    return tree(root), sorted(str(path.relative_to(root)) for path in root.rglob("*"))


def test_too_little_room_is_said_before_the_work(
    config: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr("sadm_fast.encoding.shutil.disk_usage", lambda _: usage)
    assert "needs 0.0 GB, 0.0 GB are free" in refusal(config, capfd)


def test_a_shard_that_does_not_fit_on_the_disk_ends_in_one_line_and_leaves_nothing_half_written(
    config: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # A file cannot grow beyond the limit: the kernel says so as it does of a full disk.
    ignored, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limits[1]))
        message = refusal(config, capfd)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert "00000.safetensors: cannot be written" in message and "make room and start again" in message
    assert sorted(tree(config.parent / "latents")) == ["encoding.json"]


def test_after_a_full_disk_the_shards_before_it_count(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = encoded(config)
    shards = config.parent / "again" / "shards"

    def fails_at_the_third(descriptor: int) -> None:
        if (shards / "00001.json").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fails_at_the_third)
        assert encode.main(arguments(config, f"data.path={shards.parent}")) == 2
    assert sorted(path.name for path in shards.iterdir()) == [
        "00000.json", "00000.safetensors", "00001.json", "00001.safetensors",
    ]  # fmt: skip
    assert encode.main(arguments(config, f"data.path={shards.parent}")) == 0
    assert tree(shards.parent) == whole


@pytest.mark.slow
def test_killed_and_finished_by_two_ranks_it_ends_with_the_bytes_of_one(config: Path) -> None:
    # Twice as slow as needed would be slow enough: the kill comes with the first of 21 shards.
    overrides = ["latents.shard_size=1", "latents.batch=1"]
    whole = encoded(config, *overrides)
    killed = config.parent / "killed"
    program = Program(start_line(SCRIPT, *arguments(config, f"data.path={killed}", *overrides)), config.parent)
    program.when(
        lambda: any((killed / "shards").glob("*.json")), lambda: os.killpg(program.process.pid, signal.SIGKILL)
    )
    program.finish(code=None)
    there = {path.name: path.stat().st_mtime_ns for path in (killed / "shards").glob("*.json")}
    assert 0 < len(there) < 21 and not (killed / "manifest.json").exists()
    out, _ = run_ranks("sadm_fast.encode", 2, *arguments(config, f"data.path={killed}", *overrides))
    assert f"21 shards, {len(there)} there already" in out and "21 images in 21 shards" in out
    assert tree(killed) == whole
    assert {name: (killed / "shards" / name).stat().st_mtime_ns for name in there} == there


def checked(capfd: pytest.CaptureFixture[str], path: Path) -> tuple[int, str]:
    """Exit code and stdout of --check."""
    capfd.readouterr()
    code = encode.main(["--check", str(path), "--threads", "2"])
    return code, capfd.readouterr().out


def test_check_lists_broken_images_and_damaged_shards(config: Path, capfd: pytest.CaptureFixture[str]) -> None:
    encoded(config)
    images, latents = config.parent / "images", config.parent / "latents"
    code, out = checked(capfd, images)
    assert code == 0 and "21 images of 3 classes, shortest side 16 pixels" in out and "all whole" in out
    damage(images)
    code, out = checked(capfd, images)
    problems = [line for line in out.splitlines() if line.startswith(str(images)) and "; remove it" in line]
    assert code == 1 and len(problems) == 9 and "9 broken" in out
    assert checked(capfd, latents)[0] == 0
    shard = latents / "shards/00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 4
    shard.write_bytes(content)
    code, out = checked(capfd, latents)
    assert code == 1 and f"{shard}: does not match its hash" in out and "1 broken" in out


@pytest.mark.parametrize("option", ["--check", "--bench"])
def test_a_path_that_is_not_there_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str], option: str) -> None:
    assert encode.main([option, str(tmp_path / "nowhere")]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith(f"error: {option} {tmp_path}") and "no such folder" in err
    assert err.count("\n") == 1
