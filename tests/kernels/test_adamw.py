"""The optimizer's one pass: against torch's AdamW, and each implementation against the definition."""

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

NUMBERS: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
EPS = 2.0**-23
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


def assert_equal_but_for_rounding(found: State, expected: State) -> None:
    for a, b in zip(found.buffers, expected.buffers, strict=True):
        # Each of 3 steps rounds a handful of products and sums of values of size below 8; a weight then once more.
        eps = 2.0**-8 if a.dtype == torch.bfloat16 else EPS
        torch.testing.assert_close(a, b, rtol=8 * eps, atol=24 * EPS)


@pytest.fixture(params=["definition", with_cpp, "strict", pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """(device, impl) that a test runs on."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        return "cuda", "triton"
    if request.param != "strict":
        return "cpu", request.param
    strict = request.getfixturevalue("strict")
    code = strict.load(Path(optimizer.__file__).with_name("optimizer_code.py"))
    monkeypatch.setattr(optimizer, "_kernels", lambda: code)
    monkeypatch.setattr(optimizer, "BLOCK", 64)
    return "cpu", "triton"


@pytest.mark.parametrize("gradient", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_it_is_torchs_adamw(place: tuple[str, str], gradient: torch.dtype, clip: float) -> None:
    device, impl = place
    state = State(300, gradient, torch.bfloat16, 1, device)
    parameter = torch.nn.Parameter(state.master.clone())
    theirs = torch.optim.AdamW([parameter], **NUMBERS)
    mean = parameter.detach().clone()
    for number in (1, 2, 3):
        parameter.grad = state.gradients[number - 1].float()
        if clip:
            torch.nn.utils.clip_grad_norm_([parameter], clip)
        theirs.step()
        mean.lerp_(parameter.detach(), 0.7)
        state.step(number, impl=impl, max_norm=clip)
    # The norm is a float32 sum there and float64 here: 300 roundings at most, in a step of at most lr.
    bound = 3 * NUMBERS["lr"] * 300 * EPS + 24 * EPS
    torch.testing.assert_close(state.master, parameter.detach(), rtol=0, atol=bound)
    torch.testing.assert_close(state.averages[0], mean, rtol=0, atol=bound)
    assert state.weight is not None and torch.equal(state.weight, state.master.bfloat16())


@pytest.mark.parametrize("gradient", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("averages", [0, 1, 4])
def test_it_is_the_definition(
    place: tuple[str, str], gradient: torch.dtype, weight: torch.dtype | None, averages: int
) -> None:
    device, impl = place
    found, expected = (State(301, gradient, weight, averages, device) for _ in range(2))
    for number in (1, 2, 3):
        found.step(number, impl=impl)
        expected.step(number, impl="definition")
    assert_equal_but_for_rounding(found, expected)


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


def test_what_is_saved_comes_back_only_where_the_norm_is_not_finite(place: tuple[str, str]) -> None:
    device, impl = place
    if impl == "definition":
        pytest.skip("restoring has no such choice")
    restore: Callable[..., None] = optimizer.restore_if_not_finite if impl == "triton" else restore_if_not_finite
    tensors = [torch.arange(100.0, device=device), torch.arange(70, device=device).bfloat16()]
    saved = [-x for x in tensors]
    kept = [x.clone() for x in tensors]
    restore(torch.tensor(3.0, device=device), tensors, saved)
    assert all(torch.equal(a, b) for a, b in zip(tensors, kept, strict=True))
    restore(torch.tensor(float("nan"), device=device), tensors, saved)
    assert all(torch.equal(a, b) for a, b in zip(tensors, saved, strict=True))


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
def test_it_compiles_for_a_gpu_without_spills(monkeypatch: pytest.MonkeyPatch, averages: int) -> None:
    pytest.importorskip("triton")
    from sadm_kernels.triton import optimizer_code

    recorder: Any = aot._Recorder()
    monkeypatch.setattr(optimizer, "_kernels", lambda: recorder)

    def empty(dtype: torch.dtype) -> Tensor:
        return torch.empty(1 << 20, dtype=dtype, device="meta")

    wide = [empty(torch.float32) for _ in range(3)]
    means, norm = [empty(torch.float32)] * averages, torch.empty((), device="meta")
    buffers = Buffers(wide[0], empty(torch.bfloat16), wide[1], wide[2], means, empty(torch.bfloat16))
    optimizer.adamw_step(buffers, norm, Numbers(1.0, (0.9, 0.999), 1e-8, 1.0, 1e-4, 0.3, (0.01,) * averages))
    (work,) = recorder.launches
    usage = aot.usage_of(*aot.machine_code(optimizer_code.adamw, work, 90))
    # 2,048 threads of at most 32 registers would fill a multiprocessor; 64 leave half of that, enough for its memory.
    assert usage.stack == usage.local == 0 and usage.registers <= 64
