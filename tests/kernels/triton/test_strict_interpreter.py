# mypy: disable-error-code="name-defined"
"""The strict interpreter catches, one by one, what Triton's own lets pass."""

import os

import numpy as np
import pytest
import torch

from tests.kernels.triton import strict_interpreter
from tests.kernels.triton.strict_interpreter import StrictError, strict_mode, unsupported

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
BF16 = torch.bfloat16


def refuses(what: str):
    """Triton wraps what a kernel raises, and keeps the message."""
    return pytest.raises(triton.runtime.errors.InterpreterError, match=what)


def product(a, b, out, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    rows, inner = tl.arange(0, N), tl.arange(0, K)
    x = tl.load(a + rows[:, None] * K + inner[None, :])
    y = tl.load(b + inner[:, None] * N + rows[None, :])
    tl.store(out + rows[:, None] * N + rows[None, :], tl.dot(x, y, input_precision=PRECISION))


def matrices(n: int, k: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(n, k, generator=generator).to(dtype), torch.randn(k, n, generator=generator).to(dtype)
    return a, b, torch.empty(n, n)


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
def test_a_dot_is_one_of_numbers(strict, dtype) -> None:
    a, b, out = matrices(32, 64, dtype)
    strict.jit(product)[(1,)](a, b, out, 32, 64, "ieee")
    # Products of narrow numbers are exact; 64 sums of them in float32, of order 64 at most.
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=0, atol=64 * 64 * 2.0**-24)


@pytest.mark.parametrize(
    ("precision", "least", "most"),
    [("ieee", 0.0, 2.0**-18), ("tf32x3", 0.0, 2.0**-18 + 2.0**-20), ("tf32", 2.0**-15, 2.0**-18 + 2.0**-10)],
)
def test_tf32_rounds(strict, precision: str, least: float, most: float) -> None:
    a, b, out = matrices(32, 64, torch.float32)
    strict.jit(product)[(1,)](a, b, out, 32, 64, precision)
    # 64 additions in float32, at 2^-24 of what is added; two factors rounded at 2^-11 (tf32), or the product of what
    # that leaves and the roundings of the two other products, at 2^-22 each (tf32x3).
    size = float((a.double().abs() @ b.double().abs()).max())
    assert least * size <= float((out.double() - a.double() @ b.double()).abs().max()) < most * size


def test_tf32_is_the_default_as_on_a_gpu(strict) -> None:
    a, b, out = matrices(16, 16, torch.float32)
    expected = torch.empty_like(out)
    strict.jit(product)[(1,)](a, b, out, 16, 16, None)
    strict.jit(product)[(1,)](a, b, expected, 16, 16, "tf32")
    assert torch.equal(out, expected) and not torch.equal(out, a @ b)


def test_matrix_instructions_want_16_of_the_inner_dimension(strict) -> None:
    a, b, out = matrices(16, 8, BF16)
    with refuses("K >= 16"):
        strict.jit(product)[(1,)](a, b, out, 16, 8, "ieee")


def convert(x, out, N: tl.constexpr):
    lanes = tl.arange(0, N)
    tl.store(out + lanes, tl.load(x + lanes).to(out.dtype.element_ty))


@pytest.mark.parametrize(("source", "target"), [(torch.float32, BF16), (BF16, torch.float32), (BF16, torch.float16)])
def test_conversions_round_as_pytorch_does(strict, source, target) -> None:
    halfway = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, -1 - 2.0**-8, 3e38, 1e-40, 0.0, -0.0, float("inf")])
    x = torch.cat([halfway, torch.randn(120)]).to(source)
    out = torch.empty(128, dtype=target)
    strict.jit(convert)[(1,)](x, out, 128)
    assert torch.equal(out, x.to(target))
    nan = torch.full((16,), float("nan"), dtype=source)
    strict.jit(convert)[(1,)](nan, out, 16)
    assert out[:16].isnan().all()


def add(x, out, N: tl.constexpr):
    lanes = tl.arange(0, N)
    tl.store(out + lanes, tl.load(x + lanes) + tl.load(x + lanes))


def absolute(x, out, N: tl.constexpr):
    lanes = tl.arange(0, N)
    tl.store(out + lanes, tl.abs(tl.load(x + lanes)))


def total(x, out, N: tl.constexpr):
    tl.store(out, tl.sum(tl.load(x + tl.arange(0, N)), axis=0))


@pytest.mark.parametrize("kernel", [add, absolute, total])
def test_arithmetic_wants_bfloat16_converted_first(strict, kernel) -> None:
    x = torch.ones(16, dtype=BF16)
    with refuses("bfloat16"):
        strict.jit(kernel)[(1,)](x, torch.empty_like(x), 16)
    wide = torch.empty(16)
    strict.jit(kernel)[(1,)](x.float(), wide, 16)
    assert wide[0].isfinite()


def copy(x, out, shift, n, N: tl.constexpr):
    lanes = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out + lanes, tl.load(x + shift + lanes, mask=lanes < n, other=0.0), mask=lanes < n)


@pytest.mark.parametrize("shift", [-1, 1, 1 << 20])
def test_reading_beyond_a_tensor(strict, shift: int) -> None:
    x = torch.randn(40)
    strict.jit(copy)[(3,)](x, torch.empty(40), 0, 40, 16)
    with refuses("out of bounds"):
        strict.jit(copy)[(3,)](x, torch.empty(40), shift, 40, 16)


def test_reading_beyond_a_view_into_the_rest_of_its_storage(strict) -> None:
    x = torch.randn(41)
    with refuses("out of bounds"):
        strict.jit(copy)[(3,)](x[:40], torch.empty(40), 1, 40, 16)


def test_writing_beyond_a_tensor(strict) -> None:
    with refuses("out of bounds"):
        strict.jit(copy)[(3,)](torch.randn(40), torch.empty(39), 0, 40, 16)


def careless(x, out, n, N: tl.constexpr):
    lanes = tl.arange(0, N)
    tl.store(out + lanes, tl.load(x + lanes, mask=lanes < n))


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
def test_masked_lanes_without_a_value_are_nan(strict, dtype) -> None:
    out = torch.empty(16, dtype=dtype)
    strict.jit(careless)[(1,)](torch.ones(10, dtype=dtype), out, 10, 16)
    assert torch.equal(out[:10], torch.ones(10, dtype=dtype)) and out[10:].isnan().all()


def test_masked_lanes_of_integers_are_large(strict) -> None:
    out = torch.empty(16, dtype=torch.int64)
    strict.jit(careless)[(1,)](torch.ones(10, dtype=torch.int64), out, 10, 16)
    assert (out[10:] == torch.iinfo(torch.int64).max).all()


def write_same(out):
    tl.store(out, 1.0)


def write_lane_twice(out, N: tl.constexpr):
    tl.store(out + tl.arange(0, N) // 2, 1.0)


def shift_in_place(x, step, n):
    i = tl.program_id(0)
    tl.store(x + i, tl.load(x + (i + n + step) % n))


def double_in_place(x, N: tl.constexpr):
    lanes = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(x + lanes, 2.0 * tl.load(x + lanes))


def read_back(x, out):
    tl.store(x + tl.program_id(0), 1.0)
    tl.store(out + tl.program_id(0), tl.load(x + tl.program_id(0)))


def count(x):
    tl.atomic_add(x, 1.0)


def test_two_programs_writing_one_place(strict) -> None:
    strict.jit(write_same)[(1,)](torch.empty(1))
    with refuses("race: a program writes what another one of the same launch has written"):
        strict.jit(write_same)[(2,)](torch.empty(1))


def test_two_elements_of_a_store_in_one_place(strict) -> None:
    with refuses("race: two elements"):
        strict.jit(write_lane_twice)[(1,)](torch.empty(16), 16)


@pytest.mark.parametrize("step", [-1, 1])
def test_one_program_reading_what_another_one_writes(strict, step: int) -> None:
    with refuses("race"):
        strict.jit(shift_in_place)[(4,)](torch.zeros(4), step, 4)


def test_programs_may_change_what_is_theirs(strict) -> None:
    x = torch.ones(64)
    for _ in range(2):  # launches follow one another
        strict.jit(double_in_place)[(4,)](x, 16)
    assert (x == 4).all()


def test_reading_back_needs_a_barrier(strict) -> None:
    with refuses("race: a program reads what"):
        strict.jit(read_back)[(2,)](torch.zeros(2), torch.zeros(2))


def test_atomics_are_refused(strict) -> None:
    with refuses("atomic"):
        strict.jit(count)[(2,)](torch.zeros(1))


def forgetful(out, n, N: tl.constexpr):
    lanes = tl.arange(0, N)
    tl.store(out + lanes, 0.0, mask=lanes < n)


def test_what_a_kernel_forgets_to_write_is_nan(strict) -> None:
    out = torch.empty(16)
    strict.jit(forgetful)[(1,)](out, 15, 16)
    assert not out[:15].any() and out[15].isnan()
    assert torch.empty_like(out).isnan().all() and out.new_empty(3, dtype=BF16).isnan().all()


def test_programs_run_in_any_order(strict) -> None:
    def order() -> list[int]:
        strict.begin(20)
        return [strict.turn(i) for i in range(20)]

    assert order() == list(range(20))
    strict.shuffle(3)
    assert order() != list(range(20)) and sorted(order()) == list(range(20)) and order() == order()
    x, out = torch.randn(40), torch.empty(40)
    strict.jit(copy)[(3,)](x, out, 0, 40, 16)
    assert torch.equal(out, x)


def test_everything_is_put_back() -> None:
    if (reason := unsupported()) is not None:
        pytest.skip(reason)
    from triton.runtime import interpreter

    places = [tl, tl.core, tl.math, tl.standard, tl.tensor, tl.dtype, interpreter, interpreter.InterpreterBuilder]
    places += [interpreter.GridExecutor, interpreter.ReduceScanOpInterface]
    before = [dict(vars(place)) for place in places]
    environment, errors = dict(os.environ), np.geterr()
    x = torch.ones(32, dtype=BF16)
    with pytest.raises(triton.runtime.errors.InterpreterError), strict_mode() as strict:
        assert triton.knobs.runtime.interpret
        strict.jit(total)[(1,)](torch.ones(32), torch.empty(1), 32)
        strict.jit(total)[(1,)](x, torch.empty(1), 32)
    for place, attributes in zip(places, before, strict=True):
        now = dict(vars(place))
        assert now.keys() == attributes.keys(), place
        assert all(now[name] is attributes[name] for name in now), place
    assert not triton.knobs.runtime.interpret and dict(os.environ) == environment and np.geterr() == errors
    assert not torch.are_deterministic_algorithms_enabled()


def test_another_version_of_triton_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(triton, "__version__", "3.99.0")
    with pytest.raises(RuntimeError, match=r"triton 3\.99\.0: .* knows 3\.7\.1 and 3\.8\.0 only"), strict_mode():
        pass


def test_the_error_is_not_one_of_tritons() -> None:
    assert not issubclass(StrictError, triton.runtime.errors.InterpreterError) and strict_interpreter.SUPPORTED
