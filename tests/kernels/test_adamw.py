"""The optimizer's one pass: against torch's AdamW, and each implementation against the definition on a CPU."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sadm_kernels import native
from sadm_kernels.adamw import Buffers, Numbers, adamw_step, bytes_per_element, restore_if_not_finite, total_norm
from sadm_kernels.triton import aot, optimizer
from tests.support.dispatched import Dispatched

NUMBERS: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
EPS = 2.0**-23
# Whether torch, on this processor, fuses products with the sums behind them.
FUSES = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
with_cpp = pytest.param(
    "native", marks=pytest.mark.skipif(native.why_missing() != "ok", reason="the C++ library was not built")
)


class State:
    """A parameter's buffers, of n elements."""

    def __init__(self, n: int, gradient: torch.dtype, weight: torch.dtype | None, averages: int, device: str = "cpu"):
        generator = torch.Generator().manual_seed(n)
        self.master = torch.randn(n, generator=generator).to(device)
        self.first, self.second = torch.zeros(2, n, device=device)
        self.averages = [self.master.clone() for _ in range(averages)]
        self.weight = None if weight is None else torch.zeros(n, dtype=weight, device=device)
        self.gradients = [torch.randn(n, generator=generator).to(device, gradient) for _ in range(3)]

    def step(self, number: int, norm: Tensor | None = None, impl: str = "auto", max_norm: float = 0.5) -> None:
        gradient = self.gradients[number - 1]
        if norm is None:
            norm = total_norm([gradient], gradient.device).float()
        decays = [0.3, 0.9, 0.5, 0.99][: len(self.averages)]
        adamw_step(
            self.master, gradient, self.first, self.second, self.averages, self.weight,
            norm=norm, max_norm=max_norm, step=number, decays=decays, impl=impl, **NUMBERS,
        )  # fmt: skip

    @property
    def buffers(self) -> list[Tensor]:
        weight = [] if self.weight is None else [self.weight]
        return [self.master, self.first, self.second, *self.averages, *weight]


def assert_same(found: State, expected: State, *, fuses: bool = FUSES) -> None:
    """Equal to the last bit, or, without fused multiply-add, but for the roundings of products that are added."""
    for a, b in zip(found.buffers, expected.buffers, strict=True):
        if fuses:
            assert torch.equal(a.cpu(), b)
        else:
            # Each of 3 steps rounds a handful of products and sums of values of size below 8; a weight then once more.
            eps = 2.0**-8 if a.dtype == torch.bfloat16 else EPS
            torch.testing.assert_close(a.cpu(), b, rtol=8 * eps, atol=24 * EPS)


@pytest.fixture(params=["definition", with_cpp, "strict", pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """(device, impl) that a test runs on."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        return "cuda", "triton"
    if request.param != "strict":
        return "cpu", request.param
    interpreted(request.getfixturevalue("strict"), monkeypatch)
    return "cpu", "triton"


def interpreted(strict: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the Triton kernels run in the strict interpreter, on small blocks."""
    code = strict.load(Path(optimizer.__file__).with_name("optimizer_code.py"))
    monkeypatch.setattr(optimizer, "_kernels", lambda: code)
    monkeypatch.setattr(optimizer, "BLOCK", 64)


@pytest.mark.parametrize("gradient", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clip", [0.0, 0.5, 1e6])
def test_it_has_the_bits_of_torchs_fused_adamw(place: tuple[str, str], gradient: torch.dtype, clip: float) -> None:
    if not FUSES:
        pytest.skip("torch has no fused multiply-add on this processor, or none that is known")
    device, impl = place
    state = State(304, gradient, torch.bfloat16, 1, device)  # whole vectors of 16
    parameter = torch.nn.Parameter(state.master.cpu().clone())
    theirs = torch.optim.AdamW([parameter], fused=True, **NUMBERS)
    mean = parameter.detach().clone()
    for number in (1, 2, 3):
        parameter.grad = state.gradients[number - 1].cpu().float().clone()
        norm = torch.nn.utils.get_total_norm([parameter.grad])
        if clip:
            torch.nn.utils.clip_grads_with_norm_([parameter], clip, norm)
        theirs.step()
        mean.lerp_(parameter.detach(), 0.7)
        state.step(number, norm.to(device), impl=impl, max_norm=clip)
    moments = theirs.state[parameter]
    expected = [parameter, moments["exp_avg"], moments["exp_avg_sq"], mean, parameter.bfloat16()]
    assert all(torch.equal(a.cpu(), b) for a, b in zip(state.buffers, expected, strict=True))


@pytest.mark.parametrize("gradient", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("averages", [0, 1, 4])
def test_it_is_the_definition(
    place: tuple[str, str], gradient: torch.dtype, weight: torch.dtype | None, averages: int
) -> None:
    device, impl = place
    for n in (5, 301, 512):
        found, expected = State(n, gradient, weight, averages, device), State(n, gradient, weight, averages)
        for number in (1, 2, 3):
            found.step(number, torch.tensor(3.0, device=device), impl=impl)
            expected.step(number, torch.tensor(3.0), impl="definition")
        assert_same(found, expected)


@pytest.mark.parametrize("gradient", [torch.float32, torch.bfloat16])
def test_every_instruction_set_is_the_definition(instruction_set: str, gradient: torch.dtype) -> None:
    for n in (1, 15, 16, 17, 1023, 5000):
        found, expected = (State(n, gradient, torch.bfloat16, 4) for _ in range(2))
        for number in (1, 2, 3):
            found.step(number, torch.tensor(3.0), impl="native")
            expected.step(number, torch.tensor(3.0), impl="definition")
        assert_same(found, expected, fuses=FUSES and instruction_set != "baseline")


@pytest.mark.skipif(native.why_missing() != "ok", reason="the C++ library was not built")
def test_the_cpu_kernels_run_no_operation_of_pytorch() -> None:
    state, norm = State(100, torch.bfloat16, torch.bfloat16, 2), torch.tensor(1.0)
    with Dispatched() as mode:
        state.step(1, norm, impl="native")
        restore_if_not_finite(norm, [state.master], [state.first])
    assert mode.names == []


@pytest.mark.parametrize("norm", [float("nan"), float("inf"), -float("inf")])
def test_nothing_is_written_where_the_norm_is_not_finite(place: tuple[str, str], norm: float) -> None:
    device, impl = place
    state = State(130, torch.bfloat16, torch.bfloat16, 2, device)
    state.step(1, impl=impl)
    before = [x.clone() for x in state.buffers]
    state.step(2, torch.tensor(norm, device=device), impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(before, state.buffers, strict=True))
    state.gradients[1][7] = float("nan")
    state.step(2, torch.tensor(1.0, device=device), impl=impl)
    assert state.master[7].isnan() and int(state.master.isnan().sum()) == 1  # a NaN stays one, and its own


@pytest.mark.skipif(native.why_missing() != "ok", reason="the C++ library was not built")
@settings(deadline=None, max_examples=15)
@given(n=st.integers(0, 20_000), gradient=st.sampled_from([torch.float32, torch.bfloat16]), threads=st.integers(1, 3))
def test_the_number_of_threads_changes_no_bit(n: int, gradient: torch.dtype, threads: int) -> None:
    before = torch.get_num_threads()
    states = [State(n, gradient, torch.bfloat16, 1) for _ in range(2)]
    norms = []
    try:
        for state, count in zip(states, (1, threads), strict=True):
            torch.set_num_threads(count)
            state.step(1, impl="native" if n else "auto")
            norms.append(total_norm([state.gradients[0], state.master], torch.device("cpu")))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*(state.buffers for state in states), strict=True))
    assert torch.equal(*norms)
    together = torch.cat([states[0].gradients[0].double(), states[0].master.double()])
    assert float(norms[0]) == pytest.approx(float(together.norm()), rel=1e-12)


def test_what_is_saved_comes_back_only_where_the_norm_is_not_finite(
    place: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    device, impl = place
    if impl == "definition":  # what there is without the library
        monkeypatch.setattr(native, "why_missing", lambda: "not built")
    restore: Callable[..., None] = optimizer.restore_if_not_finite if impl == "triton" else restore_if_not_finite
    tensors = [torch.arange(100.0, device=device), torch.arange(70, device=device).bfloat16()]
    saved = [-x for x in tensors]
    kept = [x.clone() for x in tensors]
    restore(torch.tensor(3.0, device=device), tensors, saved)
    assert all(torch.equal(a, b) for a, b in zip(tensors, kept, strict=True))
    restore(torch.tensor(float("nan"), device=device), tensors, saved)
    assert all(torch.equal(a, b) for a, b in zip(tensors, saved, strict=True))


@pytest.mark.parametrize("gradient", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight", [None, torch.bfloat16])
@pytest.mark.parametrize("averages", range(5))
def test_the_triton_kernel_moves_each_byte_once(
    strict: Any, monkeypatch: pytest.MonkeyPatch, gradient: torch.dtype, weight: torch.dtype | None, averages: int
) -> None:
    interpreted(strict, monkeypatch)
    n, programs = 10 * optimizer.BLOCK, 10
    State(n, gradient, weight, averages).step(1, torch.tensor(1.0), impl="triton")
    of_norms = n * gradient.itemsize  # bytes_per_element has the norm's reading of the gradient, too
    assert strict.memory.loaded + strict.memory.stored - 4 * programs + of_norms == n * bytes_per_element(
        gradient, weight, averages
    )
    State(n, gradient, weight, averages).step(1, torch.tensor(math.inf), impl="triton")
    assert (strict.memory.loaded, strict.memory.stored) == (4 * programs, 0)
    for norm, moved in ((1.0, 0), (math.nan, 4 * n)):
        optimizer.restore_if_not_finite(torch.tensor(norm), [torch.zeros(n)], [torch.ones(n)])
        assert (strict.memory.loaded - 4 * programs, strict.memory.stored) == (moved, moved)


def test_at_most_40_bytes_an_element() -> None:
    assert bytes_per_element(torch.bfloat16, torch.bfloat16, averages=1) == 38
    assert bytes_per_element(torch.float32, None, averages=1) == 40


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"gradient": torch.zeros(5)}, r"gradient: \[5\] on cpu, must be contiguous \[n\], of master's n=6"),
        ({"exp_avg": torch.zeros(6, dtype=torch.float64)}, "exp_avg.dtype=torch.float64: must be torch.float32"),
        ({"weight": torch.zeros(6, dtype=torch.float16)}, "weight.dtype=torch.float16: must be torch.float32 or"),
        ({"averages": [torch.zeros(6)]}, "1 averages, 0 decays: must be as many, at most 4"),
        ({"step": 0}, "step=0: steps are counted from 1"),
    ],
)
def test_what_does_not_fit_is_named(changed: dict[str, Any], message: str) -> None:
    arguments = {name: torch.zeros(6) for name in ("master", "gradient", "exp_avg", "exp_avg_sq")}
    with pytest.raises(ValueError, match=message):
        adamw_step(**{**arguments, "norm": torch.tensor(1.0), "max_norm": 0.0, "step": 1, **NUMBERS, **changed})


@pytest.mark.parametrize("averages", [0, 1, 4])
def test_it_compiles_for_a_gpu_without_spills_to_loads_of_16_bytes(
    monkeypatch: pytest.MonkeyPatch, averages: int
) -> None:
    pytest.importorskip("triton")
    from sadm_kernels.triton import optimizer_code

    recorder: Any = aot._Recorder()
    monkeypatch.setattr(optimizer, "_kernels", lambda: recorder)

    def empty(dtype: torch.dtype) -> Tensor:
        return torch.empty((1 << 20) + 3, dtype=dtype, device="meta")

    wide = [empty(torch.float32) for _ in range(3)]
    means, norm = [empty(torch.float32)] * averages, torch.empty((), device="meta")
    buffers = Buffers(wide[0], empty(torch.bfloat16), wide[1], wide[2], means, empty(torch.bfloat16))
    optimizer.adamw_step(buffers, norm, Numbers(1.0, (0.9, 0.999), 1e-8, 1.0, 1e-4, 0.3, (0.01,) * averages))
    (work,) = recorder.launches
    cubin, shared = aot.machine_code(optimizer_code.adamw, work, 90)
    usage = aot.usage_of(cubin, shared)
    # 2,048 threads of at most 32 registers would fill a multiprocessor; 64 leave half of that, enough for its memory.
    assert usage.stack == usage.local == 0 and usage.registers <= 64
    assert work.keywords["enable_fp_fusion"] is False  # the interpreter fuses nothing in any case
    # Blocks within n, 4 elements a thread: 16 bytes of each float32 buffer, 8 of each bfloat16 one.
    code = aot.disassembled(cubin)
    for instruction in ("LDG", "STG"):
        assert len(re.findall(rf"\b{instruction}\.E\.128\b", code)) == 3 + averages
        assert len(re.findall(rf"\b{instruction}\.E\.64\b", code)) == 1
