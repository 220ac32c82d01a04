"""Evaluation on synthetic images. As a script, this file is both ranks of the two-process test."""

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from sadm_fast.metrics.evaluator import Evaluator
from sadm_fast.metrics.frechet import FeatureStatistics
from sadm_fast.metrics.judges import ClassifierJudge, Judge, PixelJudge, RandomJudge
from sadm_fast.scales import float_to_pixels, pixels_to_float

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


def test_scores_carry_their_names_floor_and_sample_count():
    evaluator = Evaluator.build(stripes(300, seed=0), judges())
    scores = evaluator.score(stripes(120, seed=1))
    assert set(scores) == NAMES | {"floor", "samples"}
    assert set(scores["floor"]) == NAMES
    assert scores["samples"] == 120
    json.dumps(scores)


def test_like_images_score_near_the_floor_and_others_far_above():
    evaluator = Evaluator.build(stripes(600, seed=0), judges())
    like, other = evaluator.score(stripes(300, seed=1)), evaluator.score(stripes(300, seed=2, period=7.0))
    for name in NAMES:
        assert like[name] < 2.0 * evaluator.floor[name]
        assert other[name] > 4.0 * evaluator.floor[name]


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
    assert all(value > 0.0 for value in first.floor.values())
    assert all(statistics.count == 200 for statistics in first.real.values())


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
    """Unequal shares of two ranks."""
    cut = len(images) // 3
    return images[:cut] if rank == 0 else images[cut:]


def run_rank(rank: int, folder: Path) -> None:
    """One of two gloo processes: its scores and statistics into folder/rank-N.json."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    features = stripes(90, seed=3).flatten(1)
    statistics = FeatureStatistics(256)
    statistics.update(share(features, rank))
    statistics.all_reduce()
    mean, covariance = statistics.moments()
    evaluator = Evaluator.build(share(stripes(300, seed=0), rank), judges())
    scores = evaluator.score(share(stripes(120, seed=1), rank))
    result = {"mean": mean.tolist(), "covariance": covariance.tolist(), "scores": scores}
    (folder / f"rank-{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_with_a_share_each_equal_one_process(tmp_path: Path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, __file__, str(tmp_path)], env=environment, check=True, timeout=240)
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert first == second

    statistics = FeatureStatistics(256)
    statistics.update(stripes(90, seed=3).flatten(1))
    expected = [moment.tolist() for moment in statistics.moments()]
    for ours, theirs in zip((first["mean"], first["covariance"]), expected, strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-12, atol=1e-12)

    scores = Evaluator.build(stripes(300, seed=0), judges()).score(stripes(120, seed=1))
    assert first["scores"]["samples"] == 120
    for name in NAMES:
        assert first["scores"][name] == pytest.approx(scores[name], rel=1e-4)


if __name__ == "__main__":  # one process imports for both
    other = multiprocessing.get_context("fork").Process(target=run_rank, args=(1, Path(sys.argv[1])))
    other.start()
    run_rank(0, Path(sys.argv[1]))
    other.join()
    sys.exit(other.exitcode)
