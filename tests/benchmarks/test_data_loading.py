"""The benchmark of the loaders: a peer that delivers the same pictures, and a table that says where it was measured."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import data_loading, dit_recipe, image_sets
from sadm_fast.data import LoaderSpec, load_samples, open_images


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_sets.photographs(tmp_path_factory.mktemp("sets") / "photographs", distinct=12, count=40)


def test_photographs_are_of_imagenets_size_in_both_orientations(root: Path) -> None:
    images = open_images(root)
    assert len(images) == 40 and len(images.classes) == image_sets.CLASSES
    sizes = [Image.open(path).size for path in sorted(root.glob("*/*.jpg"))]
    assert set(sizes) == {(500, 375), (375, 500)}


def test_a_folder_that_is_there_is_not_written_again(root: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert image_sets.photographs(root) == root
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_the_peer_lists_and_crops_as_we_do(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, peer = open_images(root), dit_recipe.FolderOfImages(root, 64)
    assert [path for path, _ in peer.samples] == [source.name(i) for i in range(len(source))]
    monkeypatch.setattr(dit_recipe.torch, "rand", lambda _: torch.ones(1))  # no flip
    ours = load_samples(source, range(6), LoaderSpec(64, 3))
    for index in range(6):
        image, label = peer[index]
        assert label == source.labels[index]
        # Their x / 255 and ours x / 127.5, then a few sums near 1: as many roundings of float32.
        torch.testing.assert_close(image, ours[index], rtol=0, atol=4 * torch.finfo(torch.float32).eps)


def test_the_peer_mirrors_half_of_its_images(root: Path) -> None:
    peer = dit_recipe.FolderOfImages(root, 16)
    torch.manual_seed(0)
    first = [peer[0][0] for _ in range(40)]
    mirrored = sum(not torch.equal(image, first[0]) for image in first)
    assert 8 <= mirrored <= 32  # 20 +- 3.2
    assert all(torch.equal(image, first[0]) or torch.equal(image.flip(-1), first[0]) for image in first)


def test_ratios_are_taken_within_a_round() -> None:
    measured = [
        data_loading.Throughput("dali", 30.0, (10.0, 80.0), (10.0, 30.0, 80.0)),
        data_loading.Throughput("dit_recipe", 20.0, (5.0, 40.0), (5.0, 20.0, 40.0)),
    ]
    dali, peer = data_loading.rows_of(data_loading.Case("photographs", 64, 8), measured)
    assert dali["ratio_to_dit_recipe"] == 2.0 and peer["ratio_to_dit_recipe"] == 1.0


@pytest.mark.slow
def test_the_script_writes_a_table_a_csv_and_a_picture(root: Path, tmp_path: Path, capsys: Any) -> None:
    options = ["--data", "photographs", "--resolutions", "16", "--micro-batches", "4", "--rounds", "1"]
    options += ["--images", "8", "--threads", "1", "--photographs", str(root), "--out", str(tmp_path / "out")]
    assert data_loading.main(options) == 0
    printed = capsys.readouterr().out
    assert "1 threads" in printed and f"torch {torch.__version__}" in printed and "Pillow" in printed
    with (tmp_path / "out/data_loading.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["loader"] for row in rows] == list(data_loading.LOADERS)
    assert all(float(row["images_per_s"]) > 0 and row["commit"] for row in rows)
    assert np.asarray(Image.open(tmp_path / "out/data_loading.png")).size > 0


@pytest.mark.parametrize("option", ["--threads", "--rounds", "--images", "--resolutions", "--micro-batches"])
def test_numbers_below_one_are_refused(option: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        data_loading.parse([option, "0"])
    assert "must be at least 1" in capsys.readouterr().err
