"""Random numbers as functions of (seed, purpose, sample): the generator's known answers, and what may not matter."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sadm_fast import counters
from sadm_fast.counters import Purpose, keep_mask, normal, permutation, philox4x32, uniform, uniform_for

quick = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**64 - 1)
sample_ids = st.lists(st.integers(0, 2**62), min_size=1, max_size=12)


# Random123's kat_vectors for philox4x32-10.
@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_words(counter: list[int], key: tuple[int, int], words: list[int]) -> None:
    found = philox4x32([torch.tensor([word, word]) for word in counter], key)
    assert [word.tolist() for word in found] == [[word, word] for word in words]


def test_the_counter_is_block_stream_and_both_halves_of_the_sample_and_the_key_both_halves_of_the_seed() -> None:
    seed, sample = (0xA4093822) | (0x299F31D0 << 32), 0x13198A2E | (0x03707344 << 32)
    for block in (0, 1):
        counter = [block, int(Purpose.FLIP), 0x13198A2E, 0x03707344]
        words = philox4x32([torch.tensor([word]) for word in counter], (0xA4093822, 0x299F31D0))
        numbers = uniform(seed, Purpose.FLIP, torch.tensor([sample]), 8)[0, 4 * block : 4 * block + 4]
        assert ((numbers * 2.0**32 - 0.5).long()).tolist() == [int(word) for word in words]


@quick
@given(seed=seeds, ids=sample_ids, count=st.integers(1, 9), data=st.data())
def test_a_samples_numbers_do_not_depend_on_its_batch(seed: int, ids: list[int], count: int, data: st.DataObject):
    order = data.draw(st.permutations(range(len(ids))))
    cut = data.draw(st.integers(0, len(ids)))
    whole = torch.tensor(ids)
    for draw in (
        lambda n: uniform(seed, Purpose.TIME, n, count),
        lambda n: normal(seed, Purpose.NOISE, n, (count,)),
        lambda n: normal(seed, Purpose.NOISE, n, (1, count, 3)),
    ):
        together = draw(whole)
        assert torch.equal(draw(whole[list(order)]), together[list(order)])
        assert torch.equal(torch.cat([draw(whole[:cut]), draw(whole[cut:])]), together)
        assert torch.equal(torch.cat([draw(n) for n in whole.split(1)]), together)


@quick
@given(seed=seeds, ids=sample_ids, few=st.integers(1, 10), more=st.integers(0, 10))
def test_asking_for_more_uniform_numbers_keeps_the_first(seed: int, ids: list[int], few: int, more: int) -> None:
    n = torch.tensor(ids)
    assert torch.equal(uniform(seed, Purpose.LATENT, n, few + more)[:, :few], uniform(seed, Purpose.LATENT, n, few))


@quick
@given(seed=seeds, ids=sample_ids, shape=st.lists(st.integers(1, 4), max_size=3))
def test_shapes_and_dtypes(seed: int, ids: list[int], shape: list[int]) -> None:
    n = torch.tensor(ids)
    numbers, noise = uniform(seed, Purpose.TIME, n, 3), normal(seed, Purpose.NOISE, n, shape)
    assert numbers.shape == (len(ids), 3) and numbers.dtype == torch.float64
    assert noise.shape == (len(ids), *shape) and noise.dtype == torch.float32
    assert noise.isfinite().all()


@pytest.mark.parametrize("by", ["C++ where it is built", "tensor operations"])
@quick
@given(seed=seeds, ids=sample_ids, purposes=st.lists(st.sampled_from(list(Purpose)), min_size=1, max_size=4))
def test_numbers_for_several_purposes_are_those_of_each(by: str, seed: int, ids: list[int], purposes: list[Purpose]):
    samples = torch.tensor(ids)
    with pytest.MonkeyPatch.context() as patch:
        if by == "tensor operations":
            patch.setattr(counters, "has_streams", lambda: False)
        found = uniform_for(seed, purposes, samples)
    assert found.dtype == torch.float64
    assert torch.equal(found, torch.stack([uniform(seed, purpose, samples)[:, 0] for purpose in purposes]))


@quick
@given(seed=seeds, ids=sample_ids, shape=st.lists(st.integers(1, 9), max_size=3), step=st.integers(0, 9))
def test_normal_numbers_are_box_muller_to_the_last_bit(seed: int, ids: list[int], shape: list[int], step: int) -> None:
    """A run must go on with the numbers it began with."""
    samples, count = torch.tensor(ids), math.prod(shape)
    half = -(-count // 2)
    words = counters._words(seed, Purpose.NOISE + (step << 8), samples, 2 * half)
    u = words.float().add_(0.5).mul_(2.0**-32)
    radius, angle = u[:, :half].log().mul_(-2.0).sqrt_(), u[:, half:] * (2.0 * math.pi)
    expected = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :count]
    assert torch.equal(normal(seed, Purpose.NOISE, samples, shape, step), expected.reshape(-1, *shape))


def test_large_draws_in_pieces_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.arange(7)
    whole = normal(5, Purpose.NOISE, ids, (3, 11))
    for chunk in (1, 70, 100):
        monkeypatch.setattr(counters, "_CPU_CHUNK_OF_FLOATS", chunk)
        assert torch.equal(normal(5, Purpose.NOISE, ids, (3, 11)), whole)


def test_an_empty_batch_gets_no_numbers() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    assert uniform(0, Purpose.TIME, none, 5).shape == (0, 5)
    assert normal(0, Purpose.NOISE, none, (3, 2)).shape == (0, 3, 2)


def test_uniform_numbers_have_the_moments_of_the_uniform_distribution() -> None:
    numbers = uniform(7, Purpose.TIME, torch.arange(50_000), 4).flatten()
    count = len(numbers)
    # Means of `count` independent numbers: five standard deviations.
    for power in (1, 2, 3):
        mean, variance = 1 / (power + 1), 1 / (2 * power + 1) - 1 / (power + 1) ** 2
        assert abs(float((numbers**power).mean()) - mean) < 5 * math.sqrt(variance / count)
    bins = torch.histc(numbers, bins=64, min=0, max=1)
    # Chi-squared with 63 degrees of freedom: mean 63, deviation 11.2.
    assert float(((bins - count / 64).square() / (count / 64)).sum()) < 63 + 5 * 11.2


@pytest.mark.parametrize("word", [0, 1, 2**31, 2**32 - 1])
def test_uniform_numbers_lie_inside_the_open_interval(word: int, monkeypatch: pytest.MonkeyPatch) -> None:
    words = (torch.full((2, 1), word),) * 4
    monkeypatch.setattr("sadm_fast.counters.philox4x32", lambda counter, key: words)
    numbers = uniform(0, Purpose.TIME, torch.arange(2), 4)
    assert (numbers > 0).all() and (numbers < 1).all()
    assert normal(0, Purpose.NOISE, torch.arange(2), (3,)).isfinite().all()


def test_normal_numbers_have_the_moments_of_the_normal_distribution() -> None:
    noise = normal(7, Purpose.NOISE, torch.arange(20_000), (5,)).double()
    count = noise.numel()
    # E z^k = 0, 1, 0, 3 with variances E z^2k - (E z^k)^2 = 1, 2, 15, 96: five standard deviations.
    for power, (mean, variance) in enumerate([(0, 1), (1, 2), (0, 15), (3, 96)], start=1):
        assert abs(float((noise**power).mean()) - mean) < 5 * math.sqrt(variance / count)
    # Columns share Box-Muller radii and angles in pairs; all must be uncorrelated, squares as well.
    for values in (noise, noise.square()):
        correlation = torch.corrcoef(values.T) - torch.eye(5)
        assert float(correlation.abs().max()) < 5 / math.sqrt(len(noise))


def test_neighbouring_samples_are_independent() -> None:
    noise = normal(0, Purpose.NOISE, torch.arange(40_000), ()).double()
    for lag in (1, 2, 128):
        assert abs(float((noise[lag:] * noise[:-lag]).mean())) < 5 / math.sqrt(len(noise) - lag)


def test_streams_differ() -> None:
    n = torch.arange(64)
    rows = torch.stack([uniform(3, purpose, n, 2).flatten() for purpose in Purpose])
    assert len(rows.unique(dim=0)) == len(Purpose)
    assert len(rows.flatten().unique()) == rows.numel()


def test_a_samplers_steps_differ_and_step_0_is_the_purposes_own_stream() -> None:
    n = torch.arange(64)
    rows = torch.stack([normal(3, Purpose.STEP_NOISE, n, (), step) for step in (0, 1, 2, 2**24 - 1)])
    assert torch.equal(rows[0], normal(3, Purpose.STEP_NOISE, n, ())) and len(rows.flatten().unique()) == rows.numel()
    assert max(Purpose) < 2**8  # the step has the other bits of their word


@quick
@given(seeds, seeds)
def test_seeds_of_64_bits_differ(first: int, second: int) -> None:
    n = torch.arange(4)
    same = torch.equal(uniform(first, Purpose.TIME, n, 4), uniform(second, Purpose.TIME, n, 4))
    assert same == (first == second)


@pytest.mark.parametrize("seed", [0, 12345])
def test_the_upper_half_of_a_seed_counts(seed: int) -> None:
    n = torch.arange(16)
    low = uniform(seed, Purpose.TIME, n)
    for high in (1, 2**31 - 1, 2**31, 2**32 - 1):
        assert not (uniform(seed + (high << 32), Purpose.TIME, n) == low).any()
    assert not torch.equal(permutation(seed, 0, 50), permutation(seed + 2**32, 0, 50))


@quick
@given(sample=st.integers(0, 2**30), high=st.integers(1, 2**31 - 1))
def test_the_upper_half_of_a_sample_counts(sample: int, high: int) -> None:
    n = torch.tensor([sample, sample + (high << 32)])
    low, other = uniform(0, Purpose.TIME, n, 4)
    assert not torch.equal(low, other)


@quick
@given(seed=seeds, epoch=st.integers(0, 2**31 - 1), n=st.integers(0, 300))
def test_a_permutation_holds_every_index_once(seed: int, epoch: int, n: int) -> None:
    order = permutation(seed, epoch, n)
    assert order.dtype == torch.int64
    assert torch.equal(order.sort().values, torch.arange(n))
    assert torch.equal(order, permutation(seed, epoch, n))


def test_permutations_of_three_are_equally_likely() -> None:
    epochs = 1200
    seen = [tuple(permutation(1, epoch, 3).tolist()) for epoch in range(epochs)]
    assert len(set(seen)) == 6
    for order in set(seen):
        # Binomial with p = 1/6: five standard deviations.
        assert abs(seen.count(order) - epochs / 6) < 5 * math.sqrt(epochs * 5 / 36)


def test_epochs_and_seeds_have_their_own_permutations() -> None:
    orders = [permutation(seed, epoch, 1000) for seed in (0, 1) for epoch in (0, 1)]
    for i, first in enumerate(orders):
        for second in orders[:i]:
            # Two independent permutations agree in one place on average.
            assert (first == second).sum() < 10


@pytest.mark.parametrize("with_library", [False, True])
def test_dropout_keeps_the_share_that_it_should_of_each_layer_by_itself(
    with_library: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if with_library and not counters.has_streams():
        pytest.skip("the C++ library was not built")
    monkeypatch.setattr(counters, "has_streams", lambda: with_library)
    ids, shape = torch.arange(40), (5, 20, 20)
    masks = [keep_mask(2**64 - 1, layer, ids, shape, 0.3) for layer in (0, 1)]
    assert masks[0].shape == (40, *shape) and masks[0].dtype == torch.bool
    error = 4 * (0.3 * 0.7 / masks[0].numel()) ** 0.5
    assert all(abs(float(mask.double().mean()) - 0.7) < error for mask in masks)
    both = float((masks[0] & masks[1]).double().mean())
    assert abs(both - 0.49) < 4 * (0.49 * 0.51 / masks[0].numel()) ** 0.5
    assert torch.equal(keep_mask(2**64 - 1, 0, ids[7:9], shape, 0.3), masks[0][7:9])
    assert bool(keep_mask(0, 0, ids, shape, 0.0).all())
