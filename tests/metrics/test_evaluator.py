"""Evaluation on synthetic images. As a module that is run, this file is a rank of the two-process test."""

import json
import os
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from sadm_fast.config_tree import flatten
from sadm_fast.counters import permutation
from sadm_fast.metrics.evaluator import Evaluator, fewest_samples
from sadm_fast.metrics.frechet import FeatureStatistics, frechet_distance
from sadm_fast.metrics.judges import PROBABILITIES, ClassifierJudge, Judge, PixelJudge, RandomJudge
from sadm_fast.metrics.scores import inception_score
from sadm_fast.scales import float_to_pixels, pixels_to_float
from tests.support.ranks import run_ranks

NAMES = {"fid_classifier", "fid_random", "fid_pixels"}


def stripes(count: int, seed: int, period: float = 4.0) -> Tensor:
    """Smooth stripes of random direction and phase: float32 [count, 1, 16, 16] in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    angle, phase = (torch.rand(2, count, 1, 1, generator=generator) * 6.2832).unbind()
    x, y = torch.arange(16.0).view(1, 1, 16), torch.arange(16.0).view(1, 16, 1)
    return torch.sin((x * angle.cos() + y * angle.sin()) * 6.2832 / period + phase).unsqueeze(1)


def judges() -> list[Judge]:
    torch.manual_seed(0)  # an untrained classifier is a feature space as good as any other here
    return [ClassifierJudge(1, width=16, depth=1), RandomJudge(1), PixelJudge(1, 16, 16)]


class Prober(Judge):
    """A judge with a second space and class probabilities, as Inception has them."""

    metric, space, text = "fd_probe", "columns", "Means of columns."
    feature_dim, classes = 16, 8
    more_spaces: ClassVar[dict[str, int]] = {"sfd_probe": 6}

    def look(self, images: Tensor) -> dict[str, Tensor]:
        columns = images.mean(dim=(1, 2))
        return {"fd_probe": columns, "sfd_probe": columns[:, 3:9], PROBABILITIES: (9 * columns[:, :8]).softmax(dim=1)}


def test_scores_carry_their_names_floor_and_sample_count():
    evaluator = Evaluator.build(stripes(300, seed=0), judges())
    scores = evaluator.score(stripes(120, seed=1))
    assert set(scores) == NAMES | {"floor", "samples"}
    assert set(scores["floor"]) == NAMES
    assert scores["samples"] == 120
    json.dumps(scores)


def test_further_spaces_have_a_distance_and_probabilities_an_inception_score_in_any_order():
    real, generated = stripes(90, seed=0), stripes(64, seed=1)
    evaluator = Evaluator.build(real, [Prober()], detailed=True)
    scores = evaluator.score(generated)
    assert set(scores["floor"]) == {"fd_probe", "sfd_probe"} and set(scores["kid"]) == {"fd_probe"}
    seen = [Prober().look(pixels_to_float(float_to_pixels(images))) for images in (generated, real)]
    moments: list[Tensor] = []
    for rows in (of["sfd_probe"] for of in seen):
        statistics = FeatureStatistics(6)
        statistics.update(rows)
        moments += statistics.moments()
    assert scores["sfd_probe"] == pytest.approx(frechet_distance(*moments), rel=1e-9)
    # The splits are random, but of a fixed seed: samples in the order of their classes would score about 1.
    probabilities = seen[0][PROBABILITIES]
    found = scores["inception_score"], scores["inception_score_std"]
    assert found == inception_score(probabilities[permutation(0, 0, 64)])
    in_order = probabilities[probabilities.argmax(dim=1).argsort()]
    assert found[0] != inception_score(in_order).mean


def test_published_moments_take_the_place_of_the_images_own():
    real, generated = stripes(90, seed=0), stripes(64, seed=1)
    columns = stripes(500, seed=5).mean(dim=(1, 2)).double()
    published = {"fd_probe": (columns.mean(dim=0), columns.T.cov())}
    evaluator = Evaluator.build(real, [Prober()], detailed=True, published=published)
    scores, own = evaluator.score(generated), Evaluator.build(real, [Prober()], detailed=True).score(generated)
    rows = Prober().look(pixels_to_float(float_to_pixels(generated)))["fd_probe"].double()
    assert scores["fd_probe"] == pytest.approx(
        frechet_distance(rows.mean(dim=0), rows.T.cov(), *published["fd_probe"]), rel=1e-9
    )
    assert scores["fd_probe"] != own["fd_probe"] and scores["sfd_probe"] == own["sfd_probe"]
    assert scores["kid"] == own["kid"] and scores["floor"]["fd_probe"] != own["floor"]["fd_probe"]

    published["sfd_probe"] = (columns[:, 3:9].mean(dim=0), columns[:, 3:9].T.cov())
    scores = Evaluator.build([], [Prober()], detailed=True, published=published).score(generated)
    assert scores["floor"] == {"fd_probe": None, "sfd_probe": None} and "kid" not in scores
    assert scores["samples"] == 64 and scores["inception_score"] == own["inception_score"]


def test_the_fewest_samples_are_those_of_every_score_asked_for():
    plain = [PixelJudge(1, 4, 4)]
    assert [fewest_samples(plain, detailed=detailed) for detailed in (False, True)] == [2, 4]
    assert fewest_samples([*plain, Prober()], detailed=True) == 10


def test_like_images_score_near_the_floor_and_others_far_above():
    evaluator = Evaluator.build(stripes(600, seed=0), judges())
    like, other = evaluator.score(stripes(300, seed=1)), evaluator.score(stripes(300, seed=2, period=7.0))
    for name in NAMES:
        assert like[name] < 2.0 * like["floor"][name]
        assert other[name] > 4.0 * like["floor"][name]


def test_the_real_images_themselves_are_at_distance_zero():
    real = stripes(300, seed=0)
    scores = Evaluator.build(real, judges()).score(real)
    for name in NAMES:
        assert scores[name] == pytest.approx(0.0, abs=1e-6)


def test_a_stream_of_batches_is_the_same_as_one_tensor():
    real, generated = stripes(100, seed=0), stripes(50, seed=1)
    whole = Evaluator.build(real, judges())
    streamed = Evaluator.build(iter(real.split(33)), judges())
    assert streamed.floor == pytest.approx(whole.floor, rel=1e-4)
    ours, theirs = streamed.score(iter(generated.split(7))), whole.score(generated)
    for name in NAMES:
        # float32 features from other batch sizes; the distance is a difference of traces of its own size
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4)


def test_floor_is_the_distance_of_disjoint_halves_of_the_seed():
    real = stripes(200, seed=0)
    first, again, other = (Evaluator.build(real, judges(), seed=seed) for seed in (1, 1, 2))
    assert first.floor == again.floor
    assert all(first.floor[name] != other.floor[name] for name in NAMES)
    # The same images in both halves would be at distance zero.
    assert all(value and value > 0.0 for value in first.floor.values())
    whole = FeatureStatistics(256)
    whole.update(pixels_to_float(float_to_pixels(real)).flatten(1))
    for ours, theirs in zip(first.real["fid_pixels"], whole.moments(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_scores_equal_those_of_the_saved_8_bit_pictures():
    evaluator = Evaluator.build(stripes(100, seed=0), judges())
    generated = stripes(100, seed=1) * 1.3  # a sampler may leave [-1, 1]
    assert evaluator.score(generated) == evaluator.score(pixels_to_float(float_to_pixels(generated)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_model_gets_an_error_not_a_score(bad: float):
    evaluator = Evaluator.build(stripes(50, seed=0), judges())
    generated = stripes(20, seed=1)
    generated[3, 0, 5, 5] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        evaluator.score(generated)


def test_refuses_what_are_not_images():
    evaluator = Evaluator.build(stripes(50, seed=0), judges())
    with pytest.raises(ValueError, match="expected float"):
        evaluator.score(torch.zeros(3, 1, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match="expected float"):
        evaluator.score(torch.zeros(3, 16, 16))
    with pytest.raises(ValueError, match="at least 2 feature vectors, got 1"):
        evaluator.score(torch.zeros(1, 1, 16, 16))


def test_judges_are_put_into_eval_mode():
    members = [judge.train() for judge in judges()]
    Evaluator.build(stripes(50, seed=0), members)
    assert not any(judge.training for judge in members)


def share(images: Tensor, rank: int) -> Tensor:
    """Ranks take images in turn; of an odd number the first has one more."""
    return images[rank::2]


def run_rank(rank: int, folder: Path) -> None:
    """One of two gloo processes: its scores and statistics into folder/rank-N.json."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    features = stripes(90, seed=3).flatten(1)
    statistics = FeatureStatistics(256)
    statistics.update(share(features, rank))
    statistics.all_reduce()
    mean, covariance = statistics.moments()
    evaluator = Evaluator.build(share(stripes(301, seed=0), rank), [*judges(), Prober()], detailed=True)
    scores = evaluator.score(share(stripes(121, seed=1), rank))
    with pytest.raises(ValueError, match=r"ranks with \[40, 81\] images have not taken them in turn"):
        evaluator.score(stripes(40 + 41 * rank, seed=1))
    result = {"mean": mean.tolist(), "covariance": covariance.tolist(), "scores": scores}
    (folder / f"rank-{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_with_a_share_each_equal_one_process(tmp_path: Path):
    run_ranks("tests.metrics.test_evaluator", 2, str(tmp_path))
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert first == second

    statistics = FeatureStatistics(256)
    statistics.update(stripes(90, seed=3).flatten(1))
    expected = [moment.tolist() for moment in statistics.moments()]
    for ours, theirs in zip((first["mean"], first["covariance"]), expected, strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-12, atol=1e-12)

    scores = Evaluator.build(stripes(301, seed=0), [*judges(), Prober()], detailed=True).score(stripes(121, seed=1))
    assert first["scores"]["samples"] == 121
    # float32 features from other batch sizes; the floor's halves, KID's subsets and the splits are the same rows
    for path, value in flatten(scores).items():
        assert flatten(first["scores"])[path] == pytest.approx(value, rel=1e-4, abs=1e-6), path


if __name__ == "__main__":
    run_rank(int(os.environ["RANK"]), Path(sys.argv[1]))
