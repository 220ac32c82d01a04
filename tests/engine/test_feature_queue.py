"""The feature queue: the last samples, in order, whatever came in which pieces."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sadm_fast.engine.feature_queue import FeatureQueue
from sadm_kernels import Queue

WIDTH = 3


def micro_batch(first: int, size: int, dtype: torch.dtype = torch.float32) -> Queue:
    """Samples first, first + 1, ...: each number tells where it belongs."""
    sample = torch.arange(first, first + size)
    row = sample[:, None] + torch.arange(WIDTH) / 4
    return Queue(row.to(dtype), -row.to(dtype), 1.0 / (1.0 + sample), sample % 7)


def empty(capacity: int) -> FeatureQueue:
    return FeatureQueue(capacity, WIDTH, torch.device("cpu"))


def by_sample(queue: FeatureQueue) -> dict[str, Tensor]:
    """What is in the queue, oldest first."""
    columns = queue.columns
    assert columns is not None
    order = columns.real[:, 0].argsort()
    return {name: values[order] for name, values in columns._asdict().items()}


def test_a_new_queue_has_no_columns() -> None:
    assert empty(4).columns is None


@settings(deadline=None, max_examples=40)
@given(
    capacity=st.integers(1, 20), steps=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 3)), min_size=1, max_size=6)
)
def test_the_last_samples_are_in_it(capacity: int, steps: list[tuple[int, int]]) -> None:
    queue, seen = empty(capacity), 0
    for size, micro_batches in steps:
        queue.push([micro_batch(seen + k * size, size) for k in range(micro_batches)])
        seen += size * micro_batches
    first = max(0, seen - capacity)
    expected = micro_batch(first, seen - first)
    for name, values in by_sample(queue).items():
        assert values.dtype == getattr(expected, name).dtype and torch.equal(values, getattr(expected, name))


def test_columns_are_no_copy_and_narrow_features_are_kept_exactly() -> None:
    queue = empty(6)
    samples = micro_batch(0, 4, torch.bfloat16)
    queue.push([samples])
    columns = queue.columns
    assert columns is not None and columns.real.dtype == torch.float32
    assert torch.equal(columns.real.bfloat16(), samples.real) and torch.equal(columns.fake.bfloat16(), samples.fake)
    assert columns.real.data_ptr() == queue.state()["real"].data_ptr()


def test_another_queue_goes_on_from_its_state() -> None:
    one, other = empty(7), empty(7)
    other.push([micro_batch(90, 5)])
    for first in (0, 5):
        one.push([micro_batch(first, 5)])
    other.load({name: value.clone() for name, value in one.state().items()})
    for queue in (one, other):
        queue.push([micro_batch(10, 5)])
    for name, value in one.state().items():
        assert torch.equal(other.state()[name], value), name


def test_the_state_of_a_queue_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"queue: real is \(5, 3\), must be \(4, 3\)"):
        empty(4).load(empty(5).state())
    state = empty(4).state()
    with pytest.raises(ValueError, match="queue: labels"):
        empty(4).load({**state, "labels": state["labels"].float()})
    with pytest.raises(KeyError):
        empty(4).load({})


def test_pushed_features_have_no_graph() -> None:
    queue, samples = empty(4), micro_batch(0, 4)
    queue.push([samples._replace(fake=samples.fake.requires_grad_(True))])
    assert not any(value.requires_grad for value in queue.state().values())
