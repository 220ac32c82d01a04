"""The fused adaLN kernels against their definition in float64: in the strict interpreter, and on a GPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sadm_kernels import adaln
from sadm_kernels.triton import adaln as host
from sadm_kernels.triton import aot

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture(params=["strict", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the kernels run; in the interpreter a few tokens a program, so that there are many programs."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        return "cuda"
    strict = request.getfixturevalue("strict")
    code = strict.load(Path(host.__file__).with_name("adaln_code.py"))
    monkeypatch.setattr(host, "_kernels", lambda: code)
    monkeypatch.setattr(host, "ROWS_FORWARD", 2)
    monkeypatch.setattr(host, "ROWS_BACKWARD", 3)
    monkeypatch.setattr(adaln, "_on_gpu", lambda x: True)
    return "cpu"


def inputs(b: int, t: int, d: int, dtype: torch.dtype, device: str, mean: float = 0.0) -> list[Tensor]:
    """x, h, gate, shift, scale; the last three as views of one wider tensor, as adaLN's linear layer gives them."""
    generator = torch.Generator().manual_seed(d)
    x, h = (torch.randn(2, b, t, d, generator=generator) + mean).to(device, dtype)
    gate, shift, scale = torch.randn(b, 3 * d, generator=generator).to(device, dtype).chunk(3, dim=1)
    return [x, h, gate, shift, scale]


def results(values: list[Tensor], gated: bool, wide: bool) -> list[Tensor]:
    """Outputs, and gradients of all inputs for fixed ones of the outputs; by the definition in float64 if `wide`."""
    dtype = torch.float64 if wide else values[0].dtype
    x, h, gate, shift, scale = (value.detach().to(dtype).requires_grad_(True) for value in values)
    if wide:
        x_out = x + gate[:, None] * h if gated else x
        outputs = [x_out, adaln._modulated(x_out, shift, scale)][not gated :]
    elif gated:
        outputs = list(adaln.gate_residual_norm_modulate(x, h, gate, shift, scale))
    else:
        outputs = [adaln.layer_norm_modulate(x, shift, scale)]
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(value.shape, generator=generator).to(values[0].device, values[0].dtype) for value in outputs]
    wanted = [x, h, gate, shift, scale] if gated else [x, shift, scale]
    gradients = torch.autograd.grad(outputs, wanted, [weight.to(dtype) for weight in weights])
    return [*outputs, *gradients]


@pytest.mark.parametrize("gated", [False, True], ids=["norm", "gate and norm"])
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(("b", "t", "d"), [(2, 7, 24), (3, 4, 64), (1, 1, 16)])
def test_values_and_gradients_are_those_of_the_definition(
    device: str, gated: bool, dtype: torch.dtype, b: int, t: int, d: int
) -> None:
    values = inputs(b, t, d, dtype, device)
    found, exact = results(values, gated, wide=False), results(values, gated, wide=True)
    assert len(found) == (7 if gated else 4)
    for a, b_ in zip(found, exact, strict=True):
        assert a.dtype == dtype and a.shape == b_.shape
        # What is stored rounds once, x' before its norm is taken; sums of 64 features and 7 tokens round in float32.
        eps = 2.0**-8 if dtype == BF16 else 2.0**-24
        size = float(b_.detach().abs().max()) + 1.0
        assert float((a.detach().double() - b_.detach()).abs().max()) <= 16 * eps * size


def test_a_mean_far_from_zero_costs_its_digits_only(device: str) -> None:
    values = inputs(2, 3, 32, FP32, device, mean=100.0)
    found, exact = results(values, False, wide=False), results(values, False, wide=True)
    # x is 100 with a deviation of 1: its difference to the mean has lost 7 of 24 bits before anything was computed.
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=float(b.detach().abs().max()) * 128 * 2.0**-21)


def test_on_a_cpu_they_are_the_operations_of_the_definition() -> None:
    x, h, gate, shift, scale = inputs(2, 5, 16, FP32, "cpu")
    norm = torch.nn.LayerNorm(16, eps=1e-6, elementwise_affine=False)
    assert torch.equal(adaln.layer_norm_modulate(x, shift, scale), norm(x) * (1 + scale[:, None]) + shift[:, None])
    x_out, y = adaln.gate_residual_norm_modulate(x, h, gate, shift, scale)
    assert torch.equal(x_out, x + gate[:, None] * h)
    assert torch.equal(y, norm(x_out) * (1 + scale[:, None]) + shift[:, None])


@pytest.mark.parametrize("gated", [False, True], ids=["norm", "gate and norm"])
def test_they_are_one_operator_each_for_a_compiler(device: str, gated: bool) -> None:
    """Shapes, dtypes and strides that torch.compile is told are those that come."""
    values = [value.requires_grad_(True) for value in inputs(2, 5, 16, FP32, device)]
    values = [value.detach().requires_grad_(True) for value in values]
    operator: Any = adaln._gate_norm_modulate if gated else adaln._norm_modulate
    arguments = tuple(values) if gated else (values[0], values[3], values[4])
    checks = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_static")
    torch.library.opcheck(operator, arguments, test_utils=checks)


@pytest.mark.parametrize("d", [384, 1152])
@pytest.mark.parametrize("gated", [False, True], ids=["norm", "gate and norm"])
def test_they_compile_for_a_gpu_without_spills(monkeypatch: pytest.MonkeyPatch, gated: bool, d: int) -> None:
    pytest.importorskip("triton")
    from sadm_kernels.triton import adaln_code

    recorder: Any = aot._Recorder()
    monkeypatch.setattr(host, "_kernels", lambda: recorder)

    def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, h, modulation = empty(64, 256, d), empty(64, 256, d), empty(64, 6 * d)
    shift, scale, gate, *_ = modulation.chunk(6, dim=1)
    mean = empty(64, 256, dtype=FP32)
    host.forward(x, h if gated else None, gate if gated else None, shift, scale, 1e-6)
    host.backward(x if gated else None, x, x, h if gated else None, gate if gated else None, scale, mean, mean)
    for work in recorder.launches:
        usage = aot.usage_of(*aot.machine_code(getattr(adaln_code, work.kernel), work, 90))
        assert usage.stack == usage.local == 0, work.kernel
        # At 128 registers a thread four programs of 128 threads (two of 256) share a multiprocessor.
        assert usage.registers <= 128, (work.kernel, usage.registers)
    assert [work.kernel for work in recorder.launches] == ["forward", "backward"]


@pytest.mark.slow
def test_a_block_is_one_graph_on_a_cpu() -> None:
    from sadm_fast.models.dit import Block

    block = Block(32, 4, 4.0)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, c = torch.randn(2, 8, 32), torch.randn(2, 32)
    torch.testing.assert_close(torch.compile(block, fullgraph=True)(x, c), block(x, c), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gated", [False, True], ids=["norm", "gate and norm"])
def test_every_activation_is_read_and_written_once(request: pytest.FixtureRequest, device: str, gated: bool) -> None:
    if device == "cuda":
        pytest.skip("the interpreter counts")
    strict = request.getfixturevalue("strict")
    b, t, d = 2, 6, 32
    x, h, gate, shift, scale = inputs(b, t, d, BF16, device)
    activation, row = b * t * d * 2, d * 2
    _, y, mean, rstd = host.forward(x, h if gated else None, gate, shift, scale, 1e-6)
    programs, rows = b * t // host.ROWS_FORWARD, 3 if gated else 2  # each reads gate, shift and scale of its sample
    assert strict.memory.loaded == activation * (2 if gated else 1) + programs * rows * row
    assert strict.memory.stored == activation * (2 if gated else 1) + 2 * 4 * b * t
    host.backward(y if gated else None, y, x, h if gated else None, gate, scale, mean, rstd)
    programs, rows = b * t // host.ROWS_BACKWARD, 2 if gated else 1  # gate and scale
    assert strict.memory.loaded == activation * (4 if gated else 2) + programs * rows * row + 2 * 4 * b * t
    assert strict.memory.stored == activation * (2 if gated else 1) + programs * (3 if gated else 2) * d * 4
