"""LightningDiT's latents: its order and scale, and the line a person reads when a file is wrong."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sadm_fast.config import Config, check_config
from sadm_fast.console import Console
from sadm_fast.data import LoaderSpec, MicroBatchPlan, make_loader, open_any
from sadm_fast.data.latents import check_shards
from sadm_fast.data.lightning_latents import LightningLatents
from sadm_fast.errors import UserError
from sadm_fast.feed import open_data
from sadm_fast.models.autoencoder import Autoencoder
from sadm_fast.scales import LatentScale
from tests.data.lightning import write_lightning_latents
from tests.support.autoencoders import save_autoencoder

SECOND = "latents_rank01_shard000.safetensors"


def _config(root: Path, **latents: Any) -> Config:
    """Of 16-pixel images, latents [4, 8, 8]."""
    data = {"source": "latents", "path": str(root), "resolution": 16, "channels": 3}
    return check_config({"name": "x", "data": data, "latents": {"autoencoder": None, "downsample": 2, **latents}})


@pytest.mark.parametrize("native", [True, False])
def test_samples_are_those_of_its_own_data_set(tmp_path: Path, monkeypatch: Any, native: bool) -> None:
    """ImgLatentDataset: files by name, rows in order, (latent - mean) / std, the flipped one for half of the draws."""
    if not native:
        monkeypatch.setattr("sadm_fast.data.latents.has_streams", lambda: False)
    latents, flipped, labels = write_lightning_latents(tmp_path / "set")
    stats = torch.load(tmp_path / "set/latents_stats.pt", weights_only=True)
    source = open_data(_config(tmp_path / "set"), Console())
    assert isinstance(source, LightningLatents) and len(source) == 11 and source.classes == ("0", "1", "2")
    assert source.labels.tolist() == labels.tolist() and source.name(6).endswith(
        "latents_rank01_shard000.safetensors: row 1"
    )
    plan = MicroBatchPlan(num_images=11, seed=0, flip=True, micro_batch=11)
    with make_loader(source, plan, LoaderSpec(16, 3)) as loader:
        batch = next(loader)
    mirror = torch.from_numpy(plan[0].mirror).bool()
    assert 0 < int(mirror.sum()) < 11
    raw = torch.where(mirror[:, None, None, None], flipped[plan[0].indices], latents[plan[0].indices])
    # Multiplied by 1 / std instead of divided by it: one rounding more.
    torch.testing.assert_close(batch.images, (raw - stats["mean"]) / stats["std"], rtol=3 * 2.0**-23, atol=0)
    assert batch.labels.tolist() == labels[plan[0].indices].tolist()
    torch.testing.assert_close(source.scale.to_raw(batch.images), raw, rtol=0, atol=2.0**-18)  # values up to 15


def test_a_multiplier_without_statistics(tmp_path: Path) -> None:
    """latent_norm: false, latent_multiplier: 0.18215."""
    latents, _, _ = write_lightning_latents(tmp_path)
    source = open_data(_config(tmp_path, scale=0.18215), Console())
    assert isinstance(source, LightningLatents) and torch.equal(source.means(np.arange(11)), latents * 0.18215)
    (tmp_path / "latents_stats.pt").unlink()
    with pytest.raises(UserError, match="has no latents_stats.pt, and latents.scale is null; put it there, or give"):
        open_data(_config(tmp_path), Console())


def test_parts_of_a_source_and_their_fingerprints(tmp_path: Path) -> None:
    write_lightning_latents(tmp_path / "set")
    source = open_any(str(tmp_path / "set"))
    assert isinstance(source, LightningLatents)
    chosen = source.subset(np.array([9, 2])).subset(np.array([1, 0]))
    assert torch.equal(chosen.means(np.arange(2)), source.means(np.array([2, 9]))) and chosen.name(1) == source.name(9)
    moved = LightningLatents.open((tmp_path / "set").rename(tmp_path / "moved"))
    assert moved.fingerprint() == source.fingerprint() != chosen.fingerprint()


def test_an_autoencoder_takes_over_the_scale_of_latents_whose_own_is_not_known(tmp_path: Path) -> None:
    write_lightning_latents(tmp_path / "set")
    source = open_any(str(tmp_path / "set"))
    assert isinstance(source, LightningLatents)
    autoencoder = Autoencoder.load(str(save_autoencoder(tmp_path / "autoencoder")))
    raw = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = autoencoder.decode(autoencoder.scale.to_scaled(raw))
    space = pickle.loads(pickle.dumps(source.space))  # noqa: S301
    autoencoder.require_space(space, "the run")
    assert autoencoder.scale == source.scale == LatentScale.of(space) and autoencoder.space["scale"] == space["scale"]
    torch.testing.assert_close(autoencoder.decode(source.scale.to_scaled(raw)), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="has 4 channels, and the run 2"):
        autoencoder.require_space({"autoencoder": None, "scale": [1.0, 2.0], "shift": [0.0, 0.0]}, "the run")


def _changed(**tensors: Any) -> Callable[[Path], object]:
    """Replace tensors of the second file; None: leave it out."""

    def change(root: Path) -> None:
        there = load_file(root / SECOND) | tensors
        save_file({name: value for name, value in there.items() if value is not None}, root / SECOND)

    return change


def _stats(**content: Any) -> Callable[[Path], object]:
    return lambda root: torch.save(
        torch.load(root / "latents_stats.pt", weights_only=True) | content, root / "latents_stats.pt"
    )


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut off": (lambda root: os.truncate(root / SECOND, 2000), f"{SECOND}: not a file of .*it is cut short"),
    "empty": (lambda root: (root / SECOND).write_bytes(b""), f"{SECOND}: not a file of LightningDiT's latents"),
    "no mirror images": (_changed(latents_flip=None), "there is no latents_flip"),
    "fewer mirror images": (_changed(latents_flip=torch.zeros(5, 4, 8, 8)), r"flip is float32 \[5, 4, 8, 8\], lat"),
    "fewer labels": (_changed(labels=torch.zeros(5, dtype=torch.long)), r"labels is int64 \[5\], not int64 \[6\]"),
    "a label": (_changed(labels=torch.tensor([0, 1, 2, -1, 0, 0])), "row 3 has label -1; it must be a class number"),
    "bfloat16": (_changed(latents=torch.zeros(6, 4, 8, 8, dtype=torch.bfloat16)), "latents is BF16"),
    "tokens": (_changed(latents=torch.zeros(6, 64, 4)), r"latents is float32 \[6, 64, 4\], not floats \[n, c, h, h\]"),
    "another shape": (
        _changed(latents=torch.zeros(6, 4, 4, 4), latents_flip=torch.zeros(6, 4, 4, 4)),
        r"its latents are float32 \[6, 4, 4, 4\], those of .* float32 \[5, 4, 8, 8\]",
    ),
    "statistics of others": (_stats(mean=torch.zeros(1, 8, 1, 1)), "mean is .1, 8, 1, 1., must"),
    "no deviation": (_stats(std=torch.zeros(1, 4, 1, 1)), "above 0"),
    "no statistics": (lambda root: (root / "latents_stats.pt").write_bytes(b"x"), "holds no tensors called mean"),
    "code": (lambda root: torch.save({"mean": print}, root / "latents_stats.pt"), "holds no tensors called mean"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_one_line(tmp_path: Path, case: str) -> None:
    write_lightning_latents(tmp_path)
    make, message = WRONG[case]
    make(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        LightningLatents.open(tmp_path)
    assert str(caught.value).isprintable()


def test_values_that_are_not_finite_are_found(tmp_path: Path) -> None:
    write_lightning_latents(tmp_path)
    flipped = load_file(tmp_path / SECOND)["latents_flip"]
    flipped[2, 0, 0, 0], flipped[4, 0, 0, 0] = torch.nan, torch.inf
    _changed(latents_flip=flipped)(tmp_path)
    message = f"{tmp_path / SECOND}: 2 of 6 latents hold values that are not finite; extract them again"
    assert check_shards(LightningLatents.open(tmp_path), threads=2) == [message]
    with pytest.raises(UserError, match="2 of 6 latents"):
        open_data(_config(tmp_path), Console())


def test_latents_of_another_size_than_was_asked_for(tmp_path: Path) -> None:
    write_lightning_latents(tmp_path)
    with pytest.raises(UserError, match=r"latents.downsample=4: the latents in .* are \[4, 8, 8\]"):
        open_data(_config(tmp_path, downsample=4), Console())
