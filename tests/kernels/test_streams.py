"""The C++ helpers that feed a trainer: the same bits as tensor operations, and rows from anywhere."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sadm_fast import counters
from sadm_fast.counters import Purpose
from sadm_kernels import native
from sadm_kernels.streams import copy_rows, has_streams, philox_uniform
from sadm_kernels.triton import aot, random

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


@pytest.fixture(params=["strict", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the kernels of random.py run: interpreted on the CPU, or on a GPU."""
    if request.param == "strict":
        strict = request.getfixturevalue("strict")
        code = strict.load(Path(random.__file__).with_name("random_code.py"))
        monkeypatch.setattr(random, "_kernels", lambda: code)
        monkeypatch.setattr(random, "PRECISE", False)
        monkeypatch.setattr(random, "BLOCK", 32)
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return "cuda"


@pytest.mark.parametrize("rate", [0.0, 0.13, 0.5])
@pytest.mark.parametrize("count", [1, 130, 203])
def test_what_dropout_keeps_is_what_the_tensor_operations_keep(
    monkeypatch: pytest.MonkeyPatch, device: str, count: int, rate: float
) -> None:
    seed, ids = (5 << 40) + 77, torch.tensor([0, 1, (9 << 32) + 4, 2**62], device=device)
    kept = random.keep(seed, int(Purpose.DROPOUT) + (3 << 8), ids, count, rate)
    monkeypatch.setattr(counters, "has_streams", lambda: False)
    assert torch.equal(kept, counters.keep_mask(seed, 3, ids, (count,), rate))


@pytest.mark.parametrize("count", [1, 64, 203])
def test_a_micro_batchs_numbers_in_one_launch_are_those_of_the_tensor_operations(
    monkeypatch: pytest.MonkeyPatch, device: str, count: int
) -> None:
    seed, ids = (5 << 40) + 77, torch.tensor([0, 1, (9 << 32) + 4, 2**62], device=device)
    others = (Purpose.TIME, Purpose.LABEL_DROP)
    normal, first = random.draw(seed, int(Purpose.NOISE), (int(others[0]), int(others[1])), ids, count)
    monkeypatch.setattr(counters, "has_streams", lambda: False)
    assert torch.equal(first, counters.uniform_for(seed, others, ids))
    expected = counters.normal(seed, Purpose.NOISE, ids, (count,))
    if device == "cuda":
        assert torch.equal(normal, expected)
    else:  # numpy's logarithm, sine and cosine are not torch's: an ulp each, and of an angle up to 2 pi
        torch.testing.assert_close(normal, expected, rtol=2**-20, atol=2**-20)


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_the_draw_compiles_for_a_gpu_with_few_registers(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    pytest.importorskip("triton")
    from sadm_kernels.triton import random_code

    recorder: Any = aot._Recorder()
    monkeypatch.setattr(random, "_kernels", lambda: recorder)
    random.draw(seed, 0, (1, 2), torch.empty(64, dtype=torch.int64, device="meta"), 4096)
    random.keep(seed, 10, torch.empty(64, dtype=torch.int64, device="meta"), 4096, 0.13)
    work, keeping = recorder.launches
    usage = aot.usage_of(*aot.machine_code(random_code.keep, keeping, 90))
    assert usage.stack == 0 and usage.registers <= 64
    usage = aot.usage_of(*aot.machine_code(random_code.draw, work, 90))
    # The stack is of CUDA's sine and cosine of large angles, which these are not: at most 7 words for both.
    assert usage.stack <= 32 and usage.registers <= 64
