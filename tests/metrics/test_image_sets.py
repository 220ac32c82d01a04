"""Sets of images from folders and .npz files, and what is said of those that cannot be scored."""

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sadm_fast.data.adm_crop import read_crop
from sadm_fast.data.image_folder import ImageFolder
from sadm_fast.errors import UserError
from sadm_fast.metrics.image_sets import ImageSet, NpzImages, list_images, open_reference, open_samples
from sadm_fast.metrics.pretrained import InceptionJudge
from sadm_fast.pictures import beside
from sadm_fast.scales import pixels_to_float

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SADM_CACHE", str(tmp_path / "cache"))


def pixels(count: int, side: int = 8, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, channels), dtype=np.uint8)


def write_folder(root: Path, images: np.ndarray, *names: str) -> Path:
    """PNGs root/NAME/number.png in turn; grey where there is one channel."""
    for number, image in enumerate(images):
        path = root / (names[number % len(names)] if names else "") / f"{number:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(path)
    return root


def expected(images: np.ndarray) -> Tensor:
    return pixels_to_float(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))


def whole(images: ImageSet, size: int = 3) -> Tensor:
    return torch.cat(list(images.batches(0, 1, size)))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_and_an_npz_of_the_same_pixels_are_the_same_set(tmp_path: Path, channels: int) -> None:
    made = pixels(10, channels=channels)
    folder = open_samples(write_folder(tmp_path / "folder", made))
    np.savez(tmp_path / "a.npz", made)
    np.savez_compressed(tmp_path / "b.npz", arr_0=made, arr_1=np.arange(10))  # labels, as ADM's own samples have them
    for found in (folder, open_samples(tmp_path / "a.npz"), open_samples(tmp_path / "b.npz")):
        assert len(found) == 10 and found.shape == (channels, 8, 8)
        assert whole(found).equal(expected(made))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_take_images_in_turn_whatever_the_batch(tmp_path: Path, world: int) -> None:
    made = pixels(10)
    np.savez(tmp_path / "a.npz", made)
    for found in (open_samples(write_folder(tmp_path / "folder", made)), open_samples(tmp_path / "a.npz")):
        for rank in range(world):
            batches = list(found.batches(rank, world, 2))
            assert torch.cat(batches).equal(expected(made)[rank::world]) and max(map(len, batches)) <= 2


def test_images_lie_at_any_depth_and_other_files_are_left_out(tmp_path: Path) -> None:
    write_folder(tmp_path / "s", pixels(6), "b", "a/deep")
    (tmp_path / "s" / "notes.txt").touch()
    (tmp_path / "s" / ".hidden.png").touch()
    (tmp_path / "s" / "a" / "circle").symlink_to(tmp_path / "s")
    source = list_images(tmp_path / "s", "")
    there = [f"a/deep/{n:06d}.png" for n in (1, 3, 5)] + [f"b/{n:06d}.png" for n in (0, 2, 4)]
    assert list(source.files) == there
    assert isinstance(source, ImageFolder) and len(open_samples(tmp_path / "s")) == 6


def test_larger_reference_images_are_cropped_as_in_training_and_evenly_chosen(tmp_path: Path) -> None:
    write_folder(tmp_path / "large", pixels(9, side=16))
    found = open_reference(tmp_path / "large", (3, 8, 8), None, CPU, at_most=4)
    assert len(found) == 3 and found.facts()["images"] == 3
    crops = [read_crop(str(tmp_path / "large" / f"{number:06d}.png"), 8, 3) for number in (0, 3, 6)]
    assert whole(found).equal(expected(np.stack(crops)))


def test_a_reference_npz_has_images_moments_or_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InceptionJudge, "feature_dim", 5)
    monkeypatch.setattr(InceptionJudge, "more_spaces", {"sfid_inception": 3})
    mean, covariance = np.arange(5.0, dtype=np.float32), np.eye(5)
    spatial = {"mu_s": np.zeros(3), "sigma_s": np.eye(3)}
    np.savez(tmp_path / "adm.npz", arr_0=pixels(4), mu=mean, sigma=covariance, **spatial)  # type: ignore[arg-type]
    np.savez(tmp_path / "edm.npz", mu=mean, sigma=covariance)
    both, moments = (open_reference(tmp_path / name, (3, 8, 8), None, CPU) for name in ("adm.npz", "edm.npz"))
    assert len(both) == 4 and both.moments.keys() == {"fid_inception", "sfid_inception"}
    assert both.facts()["moments"] == ["mu", "sigma", "mu_s", "sigma_s"]
    assert len(moments) == 0 and moments.moments.keys() == {"fid_inception"}
    assert moments.moments["fid_inception"][0].equal(torch.arange(5.0, dtype=torch.float64))
    assert moments.moments["fid_inception"][1].equal(torch.eye(5, dtype=torch.float64))
    # Of samples, moments are not asked for.
    assert open_samples(tmp_path / "adm.npz").moments == {}


def record(path: Path, **values: Any) -> None:
    beside(path).write_text(json.dumps(values))


@pytest.mark.parametrize("kind", ["folder", "npz"])
def test_a_set_that_is_not_finished_is_refused(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_folder(tmp_path / "folder", pixels(5), "0", "1")
    if kind == "npz":
        path = tmp_path / "a.npz"
        np.savez(path, pixels(5))
    record(path, images=5, complete=True, seed=7)
    assert open_samples(path).facts()["provenance"]["seed"] == 7
    for images, complete, words in (
        (8, True, "holds 5 of 8 samples; the sample.py command"),
        (5, False, "holds 5 of 5 samples, and is not marked as complete"),
        (8, False, "holds 5 of 8 samples, and is not"),
    ):
        record(path, images=images, complete=complete)
        with pytest.raises(UserError, match=words):
            open_samples(path)
    monkeypatch.chdir(path if kind == "folder" else tmp_path)  # whatever the set is called by
    with pytest.raises(UserError, match="holds 5 of 8 samples"):
        open_samples(Path("." if kind == "folder" else "a.npz"))
    beside(path).write_text("{")
    with pytest.raises(UserError, match=r"provenance\.json: is no record of samples"):
        open_samples(path)


def test_an_npz_that_is_being_drawn_is_named_as_that(tmp_path: Path) -> None:
    (tmp_path / "a.npz.parts").mkdir()
    with pytest.raises(UserError, match=r"a\.npz: is not finished; the sample\.py command that began it continues it"):
        open_samples(tmp_path / "a.npz")
    with pytest.raises(UserError, match=r"b\.npz: cannot be read \(No such file or directory\)"):
        open_samples(tmp_path / "b.npz")


LAYOUT = r"expected arr_0, uint8 \[N, H, W, 1 or 3\]"


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"samples": pixels(4)}, rf"it has samples\); {LAYOUT}$"),
        ({"arr_0": pixels(4).transpose(0, 3, 1, 2)}, rf"its arr_0 is uint8 \[4, 3, 8, 8\]\); {LAYOUT}$"),
        ({"arr_0": pixels(4).astype(np.float32)}, rf"its arr_0 is float32 \[4, 8, 8, 3\]\); {LAYOUT}$"),
        ({"arr_0": np.asfortranarray(pixels(4))}, rf"its arr_0 is uint8 \[4, 8, 8, 3\]\); {LAYOUT}$"),
        ({"arr_0": pixels(4)[0]}, rf"its arr_0 is uint8 \[8, 8, 3\]\); {LAYOUT}$"),
        ({"arr_0": pixels(0)}, rf"its arr_0 is uint8 \[0, 8, 8, 3\]\); {LAYOUT}$"),
        ({"mu": np.zeros(2048), "sigma": np.eye(3)}, rf"it has mu, sigma\); {LAYOUT}$"),
    ],
)
def test_an_npz_of_another_layout_is_one_line(tmp_path: Path, arrays: dict[str, np.ndarray], words: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=rf"a\.npz: is no \.npz of images \({words}") as found:
        open_samples(tmp_path / "a.npz")
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"mu": np.zeros(64), "sigma": np.eye(64)}, r"its mu is float64 \[64\], not \[2048\]"),
        ({"mu": np.zeros(2048), "sigma": np.eye(3)}, r"its sigma is float64 \[3, 3\], not \[2048, 2048\]"),
        ({"mu": np.full(2048, np.nan), "sigma": np.eye(3)}, "its mu holds values that are not finite"),
        ({"mu": np.zeros(2048)}, "sigma"),
        ({"mu": np.array([{}] * 2048, dtype=object), "sigma": np.eye(3)}, "Object arrays cannot be loaded"),
    ],
)
def test_moments_of_something_else_are_one_line(tmp_path: Path, arrays: dict[str, np.ndarray], words: str) -> None:
    np.savez(tmp_path / "ref.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=rf"--data .*ref\.npz: is no \.npz of images \(.*{words}.*\); {LAYOUT}, or mu"):
        open_reference(tmp_path / "ref.npz", (3, 8, 8), None, CPU)


def test_a_damaged_npz_is_one_line_when_it_is_opened_or_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, pixels(100))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"a\.npz: is no \.npz of images \(File is not a zip file\)"):
        open_samples(path)
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :])
    with pytest.raises(UserError, match=r"a\.npz: cannot be read \(Bad CRC-32"):
        whole(open_samples(path), size=40)
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        header = file.read(128 + 40 * 192)
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        archive.writestr("arr_0.npy", header)
    with pytest.raises(UserError, match=r"b\.npz: is no \.npz of images \(its arr_0 is cut off\)"):
        open_samples(tmp_path / "b.npz")


def test_a_broken_or_odd_sample_is_named_before_any_is_scored(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "s", pixels(6))
    last = folder / "000005.png"
    kept = last.read_bytes()
    last.write_bytes(kept[:-60])
    with pytest.raises(UserError, match=r"000005\.png: the image is damaged"):
        open_samples(folder)
    Image.fromarray(pixels(1, side=9)[0]).save(last)
    with pytest.raises(UserError, match=r"000005\.png: is 9x9 pixels, .*000000\.png 8x8; samples must be of one size"):
        open_samples(folder)
    Image.fromarray(pixels(1)[0, :, :, 0]).save(last)  # grey among colours is taken as colour
    assert open_samples(folder).shape == (3, 8, 8)
    if os.getuid():  # root may read everything
        last.chmod(0)
        with pytest.raises(UserError, match=r"000005\.png: no permission"):
            open_samples(folder)
    wide = write_folder(tmp_path / "wide", pixels(3)[:, :4])
    with pytest.raises(UserError, match="is 8x4 pixels; samples must be square"):
        open_samples(wide)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: has no images \(\.jpg"):
        open_samples(tmp_path / "empty")
    with pytest.raises(UserError, match="nowhere: no such folder"):
        open_samples(tmp_path / "nowhere")


def test_a_reference_that_does_not_fit_the_samples_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "ref", pixels(6))
    with pytest.raises(UserError, match="its shorter side has 8 pixels, the samples of 16x16 more"):
        open_reference(folder, (3, 16, 16), None, CPU)
    broken = write_folder(tmp_path / "broken", pixels(6))
    (broken / "000002.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"000002\.png: is an empty file; .* \(and 0 more of 6 images of --data "):
        open_reference(broken, (3, 8, 8), None, CPU)
    found = open_reference(folder, (3, 8, 8), None, CPU)
    (folder / "000004.png").write_bytes(b"")  # since it was looked at
    with pytest.raises(UserError, match=r"000004\.png: is an empty file"):
        whole(found)
    np.savez(tmp_path / "ref.npz", pixels(4))
    with pytest.raises(UserError, match=r"holds images of 8x8 pixels in 3 channel\(s\), the samples have 8x8 .* in 1"):
        open_reference(tmp_path / "ref.npz", (1, 8, 8), None, CPU)
    assert NpzImages(tmp_path / "ref.npz", "--data", samples=False).shape == (3, 8, 8)
