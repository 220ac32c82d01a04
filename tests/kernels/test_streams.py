"""The C++ helpers that feed a trainer: the same bits as tensor operations, and rows from anywhere."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sadm_fast import counters
from sadm_fast.counters import Purpose
from sadm_kernels import native
from sadm_kernels.streams import copy_rows, has_streams, philox_uniform

pytestmark = pytest.mark.skipif(not has_streams(), reason="the C++ library was not built")


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**64 - 1),
    purpose=st.sampled_from(list(Purpose)),
    ids=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=5),
    count=st.integers(1, 700),
)
def test_numbers_are_those_of_the_tensor_operations_to_the_last_bit(
    seed: int, purpose: Purpose, ids: list[int], count: int
) -> None:
    samples = torch.tensor(ids)
    expected = counters._words(seed, purpose, samples, count).float().add_(0.5).mul_(2.0**-32)
    assert torch.equal(philox_uniform(seed, int(purpose), samples, count), expected)


def test_the_number_of_threads_changes_nothing() -> None:
    ids, threads = torch.arange(64), torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(philox_uniform(3, 1, ids, 4096))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_the_default_device_of_torch_changes_nothing() -> None:
    ids = torch.arange(5)
    with torch.device("meta"):
        found = philox_uniform(3, 1, ids, 7)
    assert torch.equal(found, philox_uniform(3, 1, ids, 7))


def test_normal_numbers_are_the_same_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.arange(5) * 10**12
    with_library = counters.normal(11, Purpose.NOISE, ids, (3, 5, 7))
    monkeypatch.setattr(counters, "has_streams", lambda: False)
    assert torch.equal(counters.normal(11, Purpose.NOISE, ids, (3, 5, 7)), with_library)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 30), max_size=20), st.integers(1, 70))
def test_rows_are_copied_in_the_order_asked_for(rows: list[int], width: int) -> None:
    source = np.random.default_rng(width).integers(0, 256, (31, width), dtype=np.uint8)
    out = np.zeros((len(rows), width), np.uint8)
    addresses = torch.tensor([source.ctypes.data + width * row for row in rows], dtype=torch.int64)
    copy_rows(addresses, width, out.ctypes.data)
    np.testing.assert_array_equal(out, source[rows] if rows else out)


def test_without_the_library_they_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_library", None)
    monkeypatch.setattr(native, "_status", "not built: try")
    assert not has_streams()
    with pytest.raises(RuntimeError, match="not built: try"):
        philox_uniform(0, 0, torch.arange(2), 3)
    with pytest.raises(RuntimeError, match="not built: try"):
        copy_rows(torch.zeros(0, dtype=torch.int64), 1, 0)
