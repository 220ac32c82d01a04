"""From the configuration's data block to samples: what does not fit is said before any training."""

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sadm_fast.config import Config, check_config
from sadm_fast.console import Console
from sadm_fast.data.image_folder import ImageFolder
from sadm_fast.data.latents import LatentSource
from sadm_fast.data.order import MicroBatchPlan
from sadm_fast.errors import UserError
from sadm_fast.feed import count_classes, load_samples, open_data, open_held_out, other_classes
from tests.data.latent_caches import make_encoding, write_cache
from tests.data.loaders import open_feed


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SADM_CACHE", str(tmp_path / "cache"))


def latent_config(path: Path, data: dict[str, Any] | None = None, **latents: Any) -> Config:
    """For the caches of latent_caches.py: 8-pixel images, latents [4, 4, 4]."""
    return check_config(
        {
            "name": "x",
            "data": {"source": "latents", "path": str(path), "resolution": 8, "channels": 3} | (data or {}),
            "latents": {"downsample": 2, "scale": 0.5} | latents,
            "denoiser": {"patch_size": 2},
        }
    )


def image_config(path: Path, **data: Any) -> Config:
    block = {"path": str(path), "resolution": 8, "channels": 1, "threads": 1} | data
    return check_config({"name": "x", "data": block})


def write_images(root: Path, classes: int = 2, count: int = 6) -> Path:
    rng = np.random.default_rng(0)
    for c in range(classes):
        (root / f"c{c}").mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(root / f"c{c}" / f"{i}.png")
    return root


def test_latents_are_fed_as_the_denoiser_sees_them(tmp_path: Path) -> None:
    config = latent_config(write_cache(tmp_path / "latents"))
    source = open_data(config, Console())
    assert isinstance(source, LatentSource) and config.sample_shape == (4, 4, 4)
    with open_feed(config, source, micro_batch=4) as feed:
        batch = next(feed)
    assert batch.images.shape == (4, *config.sample_shape) and batch.images.dtype == torch.float32
    assert feed.broken == {}
    assert torch.equal(load_samples(config, source, [3, 8]), source.means(np.array([3, 8])))


def test_images_are_fed_from_a_folder_by_either_loader(tmp_path: Path) -> None:
    root = write_images(tmp_path / "images")
    both = []
    for loader in ("dali", "torch"):
        config = image_config(root, loader=loader)
        with open_feed(config, open_data(config, Console()), micro_batch=4) as feed:
            both.append(torch.cat([batch.images for batch in islice(feed, 4)]))
    assert torch.equal(*both)


FITS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "resolution": ({"resolution": 16}, {}, "data.resolution=16: the latents in data.path=.* were made with 8"),
    "pixel channels": ({"channels": 1}, {}, "data.channels=1: .* were made with 3"),
    "latent channels": ({}, {"channels": 8}, "latents.channels=8: .* were made with 4"),
    "downsampling": ({}, {"downsample": 4}, "latents.downsample=4: .* were made with 2"),
    "scale": ({}, {"scale": 0.18215}, "latents.scale=0.18215: .* were made with 0.5"),
}


@pytest.mark.parametrize("what", FITS)
def test_latents_that_do_not_fit_the_configuration_are_refused(tmp_path: Path, what: str) -> None:
    data, latents, message = FITS[what]
    config = latent_config(write_cache(tmp_path / "latents"), data, **latents)
    with pytest.raises(UserError, match=message):
        open_data(config, Console())


def test_without_a_scale_of_its_own_the_configuration_takes_the_caches(tmp_path: Path) -> None:
    source = open_data(latent_config(write_cache(tmp_path / "latents"), scale=None), Console())
    assert isinstance(source, LatentSource) and source.scale == (0.5, 0.25)


def flip_a_bit(root: Path) -> None:
    path = root / "shards/00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def test_a_shard_that_does_not_match_its_hash_is_refused_at_start_unless_told_otherwise(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "latents")
    flip_a_bit(root)
    message = r"00001\.safetensors: does not match its hash in manifest\.json; delete it and encode again"
    with pytest.raises(UserError, match=message):
        open_data(latent_config(root), Console())
    assert len(open_data(latent_config(root, {"broken": "skip"}), Console())) == 11
    assert len(open_data(latent_config(root), Console(), check=False)) == 11


def test_what_is_held_out_is_of_each_class_and_nothing_is_trained_on_it(tmp_path: Path) -> None:
    root = write_images(tmp_path / "images", count=10)
    config = image_config(root, held_out=0.2)
    rest, held_out = open_data(config, Console()), open_held_out(config, Console())
    assert held_out is not None
    assert np.bincount(rest.labels).tolist() == [8, 8] and np.bincount(held_out.labels).tolist() == [2, 2]
    names = [source.name(i) for source in (rest, held_out) for i in range(len(source))]
    assert len(set(names)) == 20
    assert len(open_data(config, Console(), path=str(root))) == 20, "other images are compared with as a whole"
    assert open_held_out(image_config(root), Console()) is None
    assert open_data(image_config(root), Console()).fingerprint() != rest.fingerprint()


def test_a_broken_image_is_refused_at_start_or_replaced_and_counted(tmp_path: Path) -> None:
    root = write_images(tmp_path / "images")
    (root / "c0/3.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"c0/3\.png: is an empty file"):
        open_data(image_config(root), Console())
    config = image_config(root, broken="skip", loader="torch")
    source = open_data(config, Console())
    with open_feed(config, source, micro_batch=12) as feed:
        images = next(feed).images
        assert len(feed.broken) == 1 and "is an empty file" in next(iter(feed.broken.values()))
    whole = load_samples(config, source, [i for i in range(12) if i != 3])
    found = [int((whole == image).all(dim=(1, 2, 3)).nonzero()) for image in images]
    assert sorted(found) == sorted([*range(11), 3])  # its successor stands in for it


SOURCES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a folder that is not there": (lambda root: image_config(root), "no such folder"),
    "latents that are not there": (lambda root: latent_config(root), "no such folder; encode the images first"),
    "images where latents should be": (lambda root: latent_config(write_images(root)), "holds no latents"),
    "latents where images should be": (lambda root: image_config(write_cache(root)), "manifest.json"),
    "shards where images should be": (
        lambda root: image_config(write_images(root), source="webdataset"), "no .*tar"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SOURCES)
def test_the_wrong_kind_of_data_is_one_line(tmp_path: Path, case: str) -> None:
    make, message = SOURCES[case]
    with pytest.raises(UserError, match=message) as caught:
        open_data(make(tmp_path / "there"), Console())
    assert "\n" not in str(caught.value)


def test_classes_without_images_are_named(tmp_path: Path) -> None:
    whole = ImageFolder.scan(write_images(tmp_path / "images", classes=12, count=1))
    assert count_classes(whole, 12) == "12 classes"
    assert count_classes(whole, 14) == "12 classes (none of 12, 13; nothing is drawn of these)"
    some = whole.subset(np.array([1, 3]))
    assert count_classes(some, 12) == (
        "2 classes (none of c0, c10, c2, c3, c4, c5, c6, c7, c8, c9; nothing is drawn of these)"
    )
    assert "c9, ... (990 classes)" in count_classes(some, 992)
    assert other_classes(["c1", "c11"], some) is None and other_classes(whole.classes, whole) is None
    line = other_classes(["c1", "a\nb"], some)
    assert line is not None and "has images of c1, c11; samples are drawn" in line and "c1, a\\nb" in line


def test_an_order_sorted_by_class_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = image_config(write_images(tmp_path / "images", count=40))
    source = open_data(config, Console())
    open_feed(config, source, micro_batch=8).close()
    monkeypatch.setattr("sadm_fast.data.order.permutation", lambda seed, epoch, n: torch.arange(n))
    assert len(set(source.labels[MicroBatchPlan(num_images=80, seed=1, flip=False, micro_batch=8)[0].indices])) == 1
    with pytest.raises(RuntimeError, match="32 samples in a row are of one class"):
        open_feed(config, source, micro_batch=8)


def test_a_cache_of_one_class_may_come_in_any_order(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "latents", make_encoding(classes=("only",), images=40))
    config = latent_config(root)
    open_feed(config, open_data(config, Console()), micro_batch=8).close()


def test_the_manifest_may_not_be_edited_to_another_scale(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "latents")
    before = open_data(latent_config(root), Console()).fingerprint()
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["encoding"]["scale"] = 0.25
    (root / "manifest.json").write_text(json.dumps(manifest))
    assert open_data(latent_config(root, scale=0.25), Console()).fingerprint() != before
