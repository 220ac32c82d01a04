"""Packed names and the split of any source."""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sadm_fast.data.source import PackedNames, Source, printable, split
from sadm_fast.errors import UserError

quick = settings(deadline=None, max_examples=50)
# What a file system can hold: any bytes but NUL, which Python shows as str with escapes for what is not UTF-8.
names = st.lists(st.binary(max_size=12).map(lambda raw: raw.replace(b"\0", b"").decode("utf-8", "surrogateescape")))


@quick
@given(names=names)
def test_names_come_back_as_they_went_in(names: list[str]) -> None:
    packed = PackedNames.from_iterable(iter(names))
    assert len(packed) == len(names)
    assert list(packed) == names == [packed[i] for i in range(len(names))]


@quick
@given(names=names.filter(bool), data=st.data())
def test_take_is_indexing_with_a_list(names: list[str], data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.integers(0, len(names) - 1)))
    taken = PackedNames.from_iterable(names).take(np.array(chosen, dtype=np.int64))
    assert list(taken) == [names[i] for i in chosen]


def test_negative_indices_count_from_the_end_and_others_are_refused() -> None:
    packed = PackedNames.from_iterable(["a", "bc"])
    assert packed[-1] == "bc" and packed[-2] == "a"
    for index in (2, -3):
        with pytest.raises(IndexError):
            packed[index]


def test_a_pickle_is_hardly_larger_than_the_names() -> None:
    packed = PackedNames.from_iterable(f"n{i % 1000:08d}/image_{i:08d}.JPEG" for i in range(10_000))
    size = len(pickle.dumps(packed))
    assert size < 10_000 * (29 + 1 + 8) + 1000  # 29 characters, a separator and an int64 each
    assert list(pickle.loads(pickle.dumps(packed))) == list(packed)  # noqa: S301


def test_printable_leaves_one_line_that_can_be_encoded() -> None:
    assert printable("Kätzchen 猫.png") == "Kätzchen 猫.png"
    assert printable("a\nb\udcff.png") == "a\\nb\\udcff.png"


@dataclass(frozen=True, eq=False)
class Numbers(Source):
    """A source of nothing but labels, to show that split needs no more."""

    samples: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    where: str = "numbers"

    def name(self, index: int) -> str:
        return str(self.samples[index])

    def fingerprint(self) -> str:
        return ""

    def subset(self, indices: np.ndarray) -> "Numbers":
        return replace(self, samples=self.samples[indices], labels=self.labels[indices])


def _numbers(counts: Sequence[int]) -> Numbers:
    labels = np.repeat(np.arange(len(counts)), counts)
    return Numbers(np.arange(len(labels)), labels, tuple(map(str, range(len(counts)))))


def test_split_holds_out_the_same_share_of_every_class() -> None:
    source = _numbers([7, 4])
    rest, held = split(source, 0.25, seed=4)
    assert np.bincount(held.labels).tolist() == [2, 1] and np.bincount(rest.labels).tolist() == [5, 3]
    assert sorted([*rest.samples, *held.samples]) == list(range(11))
    assert rest.classes == held.classes == source.classes
    for part in (rest, held):
        np.testing.assert_array_equal(part.labels, source.labels[part.samples])


def test_split_depends_on_the_seed_only() -> None:
    held = [split(_numbers([7, 4]), 0.4, seed)[1].samples.tolist() for seed in (1, 1, 2, 3)]
    assert held[0] == held[1] and len({tuple(numbers) for numbers in held}) > 1


def test_split_leaves_every_class_a_sample() -> None:
    rest, _ = split(_numbers([7, 4]), 0.99, seed=0)
    assert np.bincount(rest.labels).tolist() == [1, 1]


def test_split_of_classes_without_samples() -> None:
    rest, held = split(_numbers([0, 8, 0, 4]), 0.25, seed=0)
    assert np.bincount(held.labels).tolist() == [0, 2, 0, 1] and len(rest) == 9


def test_split_that_would_hold_out_nothing() -> None:
    with pytest.raises(UserError, match="data.path=numbers: 11 images in 2 classes are too few to hold out 0.01"):
        split(_numbers([7, 4]), 0.01, seed=0)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5])
def test_split_fraction_out_of_range(fraction: float) -> None:
    with pytest.raises(ValueError, match=f"fraction={fraction}"):
        split(_numbers([7, 4]), fraction, seed=0)
