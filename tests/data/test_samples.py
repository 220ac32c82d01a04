"""Samples of any shape: what Arrays takes, and the loader that reads them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sadm_fast.data import LoaderSpec, MicroBatchPlan, load_samples, make_loader
from sadm_fast.data.samples import Arrays
from sadm_fast.data.source import split

SPEC = LoaderSpec(resolution=8, channels=1, threads=2)
VALUES = np.arange(10 * 2 * 3, dtype=np.float32).reshape(10, 2, 3)
LABELS = np.arange(10) % 2


def batches(source: Arrays, count: int = 6, **changes: Any) -> list[Any]:
    plan = MicroBatchPlan(num_images=len(source), seed=3, **{"flip": False, "micro_batch": 4, **changes})
    with make_loader(source, plan, SPEC) as loader:
        return [next(loader) for _ in range(count)]


def test_every_sample_comes_once_an_epoch_with_its_label():
    read = batches(Arrays(VALUES, LABELS), 5)
    samples, labels = torch.cat([b.images for b in read]), torch.cat([b.labels for b in read])
    numbers = (samples[:, 0, 0] / 6).long()
    assert sorted(numbers[:10].tolist()) == list(range(10)) == sorted(numbers[10:].tolist())
    assert torch.equal(labels, numbers % 2)
    assert torch.equal(samples, torch.from_numpy(VALUES)[numbers])
    assert torch.cat([b.sample_ids for b in read]).tolist() == list(range(20))


def test_ranks_and_a_resumed_run_read_what_one_rank_would():
    source = Arrays(VALUES, LABELS)
    alone = torch.cat([b.images for b in batches(source, 4)])
    ranks = [batches(source, 2, micro_batch=2, rank=rank, world_size=2, first_sample=8) for rank in range(2)]
    assert torch.equal(torch.cat([b.images for pair in zip(*ranks, strict=True) for b in pair]), alone[8:])


def test_a_mirrored_sample_is_reversed_along_its_last_axis():
    source = Arrays(VALUES, LABELS)
    plain, mirrored = batches(source), batches(source, flip=True)
    both = list(zip(torch.cat([b.images for b in plain]), torch.cat([b.images for b in mirrored]), strict=True))
    flipped = [not torch.equal(x, y) for x, y in both]
    assert 0 < sum(flipped) < len(both)
    assert all(
        torch.equal(y, x.flip(-1) if is_flipped else x) for (x, y), is_flipped in zip(both, flipped, strict=True)
    )


def test_a_memory_map_is_read_like_an_array(tmp_path: Path):
    np.save(tmp_path / "x.npy", VALUES.astype(np.float16))
    mapped = Arrays(np.load(tmp_path / "x.npy", mmap_mode="r"), LABELS)
    assert torch.equal(load_samples(mapped, [7, 1], SPEC), torch.from_numpy(VALUES[[7, 1]]))


def test_parts_know_where_they_come_from():
    source = Arrays(VALUES, LABELS, where="ten")
    rest, held_out = split(source, 0.2, seed=0)
    assert len(rest) == 8 and len(held_out) == 2 and sorted(held_out.labels) == [0, 1]
    together = np.concatenate(
        [rest.read(np.arange(8), np.zeros(8, bool)), held_out.read(np.arange(2), np.zeros(2, bool))]
    )
    assert sorted(together[:, 0, 0]) == VALUES[:, 0, 0].tolist()
    number = int(held_out.read(np.arange(1), np.zeros(1, bool))[0, 0, 0] / 6)
    assert held_out.name(0) == f"ten[{number}]"


@pytest.mark.parametrize(
    "other",
    [
        Arrays(VALUES + 1, LABELS),
        Arrays(VALUES, 1 - LABELS),
        Arrays(VALUES, LABELS, ["a", "b"]),
        Arrays(VALUES.reshape(10, 3, 2), LABELS),
        Arrays(VALUES, LABELS).subset(np.arange(10)[::-1]),
    ],
    ids=["values", "labels", "classes", "shape", "order"],
)
def test_the_fingerprint_changes_with(other: Arrays):
    assert other.fingerprint() != Arrays(VALUES, LABELS).fingerprint() == Arrays(VALUES.copy(), LABELS).fingerprint()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"samples": VALUES[:0]}, r"samples \[0, 2, 3\] of float32: must be floats \[N, C, ...\]"),
        ({"samples": VALUES.astype(int)}, "of int64: must be floats"),
        ({"samples": VALUES[:, 0, 0]}, r"samples \[10\]"),
        ({"samples": np.where(VALUES == 5, np.nan, VALUES)}, "not finite"),
        ({"labels": LABELS[:9]}, r"labels \[9\] of int64: must be \[10\] whole numbers"),
        ({"labels": LABELS - 1}, "from 0"),
        ({"labels": LABELS / 2}, "of float64"),
        ({"labels": LABELS, "classes": ["one"]}, "labels: 1 is there, and only 1 classes are named"),
    ],
)
def test_what_is_no_set_of_samples_is_refused(given: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Arrays(**{"samples": VALUES, **given})
