"""The order of samples: a function of (seed, counter), the same however the work is divided."""

from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sadm_fast.data.order import MicroBatchPlan, SampleOrder, micro_batch_ids

# A busy machine is not a failure; the properties are simple enough for fewer examples than the default
# hundred.
quick = settings(deadline=None, max_examples=30)


@quick
@given(num_images=st.integers(1, 200), seed=st.integers(0, 2**62), epoch=st.integers(0, 1000))
def test_every_image_comes_once_an_epoch(num_images: int, seed: int, epoch: int) -> None:
    order = SampleOrder(num_images, seed)
    ids = np.arange(epoch * num_images, (epoch + 1) * num_images)
    np.testing.assert_array_equal(np.sort(order.images(ids)), np.arange(num_images))


@quick
@given(num_images=st.integers(1, 50), first=st.integers(0, 500), length=st.integers(1, 40))
def test_a_batch_across_epochs_is_the_concatenation_of_its_samples(num_images: int, first: int, length: int) -> None:
    ids = np.arange(first, first + length)
    together = SampleOrder(num_images, 5).images(ids)
    single = [SampleOrder(num_images, 5).images(ids[i : i + 1])[0] for i in range(length)]
    np.testing.assert_array_equal(together, single)


def test_epochs_and_seeds_differ() -> None:
    first, second = (SampleOrder(1000, 1).images(np.arange(1000) + 1000 * epoch) for epoch in (0, 1))
    other = SampleOrder(1000, 2).images(np.arange(1000))
    # Two independent permutations agree in one place on average.
    assert (first == second).sum() < 10 and (first == other).sum() < 10


@quick
@given(
    world_size=st.sampled_from([1, 2, 3, 4]),
    grad_accumulation=st.sampled_from([1, 2, 3]),
    micro_batch=st.sampled_from([1, 2, 5]),
    start=st.integers(0, 10**9),
    first_sample=st.integers(0, 10**12),
)
def test_all_ranks_and_micro_steps_together_are_the_single_rank_sequence(
    world_size: int, grad_accumulation: int, micro_batch: int, start: int, first_sample: int
) -> None:
    parts = [
        micro_batch_ids(
            iteration,
            micro_step,
            rank,
            micro_batch=micro_batch,
            grad_accumulation=grad_accumulation,
            world_size=world_size,
            first_sample=first_sample,
        )
        for iteration in (start, start + 1)
        for micro_step in range(grad_accumulation)
        for rank in range(world_size)
    ]
    whole = micro_batch * grad_accumulation * world_size
    expected = np.arange(first_sample + start * whole, first_sample + (start + 2) * whole)
    np.testing.assert_array_equal(np.concatenate(parts), expected)


class Division(NamedTuple):
    """How a run divides its work."""

    world_size: int
    micro_batch: int
    grad_accumulation: int


divisions = st.builds(Division, st.integers(1, 4), st.integers(1, 5), st.integers(1, 3))


def _run(division: Division, first_sample: int, iterations: int) -> list[np.ndarray]:
    """(sample ids, indices, mirror) of all ranks over some iterations, in global order; each [n]."""
    plans = [
        MicroBatchPlan(num_images=11, seed=3, flip=True, rank=rank, first_sample=first_sample, **division._asdict())
        for rank in range(division.world_size)
    ]
    batches = [plan[p] for p in range(iterations * division.grad_accumulation) for plan in plans]
    return [np.concatenate(parts) for parts in zip(*batches, strict=True)]


@quick
@given(before=divisions, after=divisions, iterations=st.integers(1, 6))
def test_a_run_divided_otherwise_continues_the_same_sequence(
    before: Division, after: Division, iterations: int
) -> None:
    first = _run(before, 0, iterations)
    second = _run(after, len(first[0]), 3)
    whole = _run(Division(1, len(first[0]) + len(second[0]), 1), 0, 1)
    for a, b, c in zip(first, second, whole, strict=True):
        np.testing.assert_array_equal(np.concatenate([a, b]), c)


@quick
@given(seed=st.integers(0, 2**62), epoch=st.integers(0, 100), classes=st.integers(4, 40), each=st.integers(8, 40))
def test_batches_mix_classes_though_the_listing_is_sorted_by_class(
    seed: int, epoch: int, classes: int, each: int
) -> None:
    labels = np.repeat(np.arange(classes), each)
    plan = MicroBatchPlan(
        num_images=len(labels), seed=seed, flip=False, micro_batch=16, first_sample=epoch * len(labels)
    )
    # With 16 draws of at least 4 classes, fewer than 2 of them happen once in 4^15 batches; sorted by class, a
    # batch would hold 1 to 3 and have its labels in order.
    seen = [labels[plan[p].indices] for p in range(len(labels) // 16)]
    assert min(len(set(batch.tolist())) for batch in seen) >= 2
    assert np.mean([len(set(batch.tolist())) for batch in seen]) > min(classes, 16) / 2
    # Neighbours of one class: 1 in `classes` by chance, nearly all in the sorted list.
    stream = np.concatenate(seen)
    assert (stream[1:] == stream[:-1]).mean() < 0.75


def test_the_mirror_flag_belongs_to_the_sample_not_to_the_batch() -> None:
    small = MicroBatchPlan(num_images=7, seed=3, flip=True, micro_batch=3)
    large = MicroBatchPlan(num_images=7, seed=3, flip=True, micro_batch=9000)  # spans blocks of the flag cache
    flags = large[0].mirror
    assert 0.45 < flags.mean() < 0.55  # 4500 +- 47 of 9000: ten standard deviations
    np.testing.assert_array_equal(np.concatenate([small[i].mirror for i in range(1333, 1500)]), flags[3999:4500])
    np.testing.assert_array_equal(np.concatenate([small[i].indices for i in range(9)]), large[0].indices[:27])


def test_without_flip_nothing_is_mirrored() -> None:
    assert not MicroBatchPlan(num_images=7, seed=3, flip=False, micro_batch=64)[0].mirror.any()


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"micro_batch": 0}, "micro_batch=0"),
        ({"rank": 2, "world_size": 2}, "rank=2"),
        ({"first_sample": -1}, "first_sample=-1"),
        ({"num_images": 0}, "num_images=0"),
    ],
)
def test_impossible_divisions_are_refused_by_name(wrong: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"num_images": 5, "seed": 0, "flip": False, "micro_batch": 2} | wrong
    with pytest.raises(ValueError, match=message):
        MicroBatchPlan(**arguments)
