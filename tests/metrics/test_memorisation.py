"""Nearest training images, shares of copies, and what held-out batches say."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sadm_fast.config import Config, check_config
from sadm_fast.data.samples import Arrays
from sadm_fast.metrics import memorisation
from sadm_fast.metrics.held_out import gaps
from sadm_fast.metrics.judges import PixelJudge, RandomJudge
from sadm_fast.metrics.memorisation import copying, look_for_copies, nearest
from sadm_fast.models import Denoiser


def rows(count: int, seed: int, width: int = 6) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_the_nearest_row_is_found_over_the_borders_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memorisation, "_QUERIES", 7)
    monkeypatch.setattr(memorisation, "_ROWS", 11)
    queries, known = rows(20, 0), rows(50, 1)
    naive = ((queries[:, None] - known[None]) ** 2).sum(dim=2).sqrt()
    found = nearest(queries, known)
    assert found.rows.tolist() == naive.argmin(dim=1).tolist()
    torch.testing.assert_close(found.distances, naive.min(dim=1).values.double(), rtol=1e-6, atol=1e-6)
    assert nearest(known[3:5], known).distances.tolist() == [0, 0]
    others = nearest(known, known, torch.arange(50))
    naive = ((known[:, None] - known[None]) ** 2).sum(dim=2).sqrt().fill_diagonal_(torch.inf)
    assert others.rows.tolist() == naive.argmin(dim=1).tolist()


def test_samples_of_the_same_distribution_are_no_copies_and_copies_are() -> None:
    known, fresh, held_out = rows(2000, 0), rows(1000, 1), rows(1000, 2)
    reference = nearest(held_out, known).distances
    alike = copying(nearest(fresh, known).distances, reference)
    # 5% of 1000: a standard deviation of 0.7%, and as much again for the threshold
    assert abs(alike.copies - 0.05) < 0.04 and abs(alike.nearer - 0.5) < 0.05 and abs(alike.deviations) < 4
    half = torch.cat([fresh[:500], known[:500] + 1e-3])
    half_copied = copying(nearest(half, known).distances, reference)
    assert abs(half_copied.copies - 0.525) < 0.04 and half_copied.deviations > 10
    away = copying(nearest(fresh + 3, known).distances, reference)
    assert away.copies < 0.01 and away.nearer < 0.1 and away.deviations < -10


def test_ties_count_half_and_equal_distances_are_alike() -> None:
    same = copying(torch.ones(5), torch.ones(4))
    assert same.nearer == 0.5 and same.deviations == 0 and same.copies == 1
    assert copying(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 1.0])).nearer == 0.5


def config(**blocks: object) -> Config:
    return check_config(
        {
            "name": "tiny",
            "data": {"source": "own", "resolution": 8},
            "sampling": {"steps": 2},
            "evaluate": {"samples": 24, "batch": 10, "steps": 2},
            **blocks,
        }
    )


class Parrot(Denoiser):
    """Sees the nearest of the images it was trained on in whatever it is given, as a network of edm's."""

    null_class = 2

    def __init__(self, config: Config, images: torch.Tensor) -> None:
        super().__init__()
        self.process, self.images = config.process, images

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        sigma = torch.exp(t / 100).view(-1, 1, 1, 1)
        data = 0.5
        x_t = x * (sigma**2 + data**2).sqrt()
        x0 = self.images[torch.cdist(x_t.flatten(1), self.images.flatten(1)).argmin(dim=1)]
        skip = data**2 / (sigma**2 + data**2)
        return (x0 - skip * x_t) * (sigma**2 + data**2).sqrt() / (sigma * data)


def images(count: int, seed: int) -> Arrays:
    rng = np.random.default_rng(seed)
    return Arrays(rng.uniform(-1, 1, (count, 1, 8, 8)).astype(np.float32), np.arange(count) % 2, where="noise")


def test_a_denoiser_that_knows_its_images_by_heart_is_found_out() -> None:
    training, held_out, of = images(40, 0), images(30, 1), config()
    judges = [PixelJudge(1, 8, 8), RandomJudge(1)]
    parrot = Parrot(of, torch.from_numpy(training.read(np.arange(40), np.zeros(40, dtype=bool))))
    told: list[tuple[str, int, int]] = []
    found = look_for_copies(
        of, parrot, judges, training, held_out, [0, 1], torch.device("cpu"), progress=lambda *call: told.append(call)
    )
    for name in ("fid_pixels", "fid_random"):
        score = found.scores[name]
        assert score["copies"] == 1 and score["nearer"] == 1
        painted, originals = found.pictures[name].chunk(2)
        assert len(painted) == 10 and (painted - originals).abs().max() < 1e-2
        first = score["nearest"][0]
        assert first["name"] == training.name(first["image"]) and first["distance"] <= score["threshold"]
    assert {what for what, done, total in told if done == total} == {"training images", "held-out images", "samples"}
    # Against one another the training images are far apart, too.
    alone = look_for_copies(of, parrot, judges, training, None, [0, 1], torch.device("cpu"))
    assert alone.scores["fid_pixels"]["copies"] == 1


def test_what_was_learned_of_single_images_is_a_gap_on_held_out_ones() -> None:
    training, held_out, of = images(40, 0), images(34, 1), config(train={"micro_batch": 16})
    known = torch.from_numpy(training.read(np.arange(40), np.zeros(40, dtype=bool)))
    found = gaps(of, Parrot(of, known), lambda x: x.flatten(1), training, held_out, torch.device("cpu"))
    assert found["loss"].difference > 2 * found["loss"].error > 0 and found["loss"].batches == 8
    assert found["S"].difference > 5 * found["S"].error and found["S"].training >= 0
    assert found["loss"].difference == pytest.approx(found["loss"].held_out - found["loss"].training)
    both = torch.cat([known, torch.from_numpy(held_out.read(np.arange(34), np.zeros(34, dtype=bool)))])
    fair = gaps(of, Parrot(of, both), None, training, held_out, torch.device("cpu"))
    assert abs(fair["loss"].difference) < 5 * fair["loss"].error and "S" not in fair
    with pytest.raises(ValueError, match="1 held-out images of classes that were trained on: too few"):
        gaps(of, Parrot(of, both), None, training, held_out.subset(np.array([0])), torch.device("cpu"))


def test_features_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    of, training = config(), images(12, 0)
    parrot = Parrot(of, torch.full((12, 1, 8, 8), torch.nan))
    with pytest.raises(ValueError, match="features of fid_pixels are not finite"):
        look_for_copies(of, parrot, [PixelJudge(1, 8, 8)], training, None, [0, 1], torch.device("cpu"))
