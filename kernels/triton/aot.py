"""Compile the kernels for GPUs that are not there, and see what they need of them.

    python -m sadm_kernels.triton.aot [--write tests/kernels/triton/budget.json]

The launches come from launch.py itself, run on tensors without data, so that what is compiled is what would be
launched: same tiles, same constants, same assumptions on alignment. Registers, spills ("stack") and instructions are
then read from the machine code. This uses private parts of Triton (3.7.1 and 3.8.0 were tried) and its NVIDIA tools.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sadm_kernels.samples import Options, Pairs, Samples
from sadm_kernels.triton import few, launch

ARCHITECTURES = (80, 90, 100)
# 80 is also what launch.py takes for Ada and consumer Blackwell; an A100 has 163 KB.
SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}


class Usage(NamedTuple):
    """What a kernel takes: registers a thread, bytes of stack a thread, shared bytes a program, instructions.

    `local` counts loads and stores of the stack (spills); `matrix` are the kinds of matrix instructions.
    """

    registers: int
    stack: int
    local: int
    shared: int
    matrix: list[str]


class Launch(NamedTuple):
    """One recorded launch."""

    kernel: str
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


class _Recorder:
    """Stands in for a module of kernels: takes launches down instead of doing them."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []

    def __getattr__(self, kernel: str) -> Any:
        def at(_grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *arguments, **keywords: self.launches.append(Launch(kernel, arguments, keywords))

        class Kernel:
            __class_getitem__ = staticmethod(at)

        return Kernel


def _pairs(dtype: torch.dtype, size: int, d: int, *, rest: bool, **options: Any) -> Pairs:
    """All pairs of samples without data; `rest`: with weights and labels."""

    def empty(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    real, fake = empty(size, d), empty(size, d)
    weight = empty(size, of=torch.float32) if rest else None
    labels = empty(size, of=torch.int64) if rest else None
    return Pairs(Samples(real, fake, weight, labels), range(size), Options(**options))


class Variant(NamedTuple):
    """Which kernel of which call."""

    kernel: str
    dtype: torch.dtype
    size: int
    d: int
    call: str = "loss_and_gradients"
    need: tuple[bool, bool] = (False, True)
    plain: bool = True  # the defaults; otherwise what takes most: gaussian, huber, mean, weights, labels


_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32

# Every row of launch.TILES, with the defaults and with all options at once, and the cases of masks, scopes and passes.
VARIANTS: dict[str, Variant] = {
    "norms fp16": Variant("row_norms", _FP16, 1024, 512),
    "weights": Variant("weight_sums", _BF16, 1024, 512, plain=False),
    "loss bf16": Variant("pair_sums", _BF16, 4096, 512, need=(False, False)),
    "loss fp32, all options": Variant("pair_sums", _FP32, 4096, 512, need=(False, False), plain=False),
    "slopes bf16, all options": Variant("pair_sums", _BF16, 4096, 512, call="slope_sums", plain=False),
    "gradient bf16": Variant("row_gradient", _BF16, 256, 512),
    "gradient bf16 ragged": Variant("row_gradient", _BF16, 256, 200),
    "gradient bf16, all options": Variant("row_gradient", _BF16, 256, 512, plain=False),
    "gradient fp16 many, all options": Variant("row_gradient", _FP16, 1024, 512, plain=False),
    "gradient fp32": Variant("row_gradient", _FP32, 256, 512),
    "gradient fp32, all options": Variant("row_gradient", _FP32, 256, 512, plain=False),
    "strip bf16": Variant("weigh_strip", _BF16, 4096, 512),
    "strip bf16 both, all options": Variant("weigh_strip", _BF16, 4096, 512, need=(True, True), plain=False),
    "strip fp32 both, all options": Variant("weigh_strip", _FP32, 4096, 512, need=(True, True), plain=False),
    "finish": Variant("finish_strip", _BF16, 4096, 512),
    "micro-batch weights bf16": Variant("few_weights", _BF16, 64, 512, call="few"),
    "micro-batch weights fp16 both, all options": Variant(
        "few_weights", _FP16, 250, 208, call="few", need=(True, True), plain=False
    ),
    "micro-batch weights fp32 both": Variant("few_weights", _FP32, 64, 512, call="few", need=(True, True)),
    "micro-batch weights fp32 both, 500 features, all options": Variant(
        "few_weights", _FP32, 64, 500, call="few", need=(True, True), plain=False
    ),
    "micro-batch sums": Variant("few_sums", _BF16, 64, 512, call="few"),
    "micro-batch gradient bf16": Variant("few_gradient", _BF16, 64, 512, call="few"),
    "micro-batch gradient bf16 both, 500 features": Variant(
        "few_gradient", _BF16, 64, 500, call="few", need=(True, True)
    ),
    "micro-batch gradient fp16 both": Variant("few_gradient", _FP16, 250, 208, call="few", need=(True, True)),
    "micro-batch gradient fp32 both": Variant("few_gradient", _FP32, 64, 512, call="few", need=(True, True)),
}


def record(variant: Variant, capability: int) -> Launch:
    """The launch of `variant.kernel` on a GPU of that compute capability (times ten)."""
    recorder = _Recorder()
    machine = launch.Machine(recorder, capability)
    options = {} if variant.plain else {"relation": "gaussian", "penalty": "huber", "normalize": "none"}
    p = _pairs(variant.dtype, variant.size, variant.d, rest=not variant.plain, **options)
    moments = None if variant.plain else torch.empty(4, dtype=torch.float64, device="meta")
    if variant.call == "few":
        state = few.forward(p.samples, p.options, variant.need, kernels=recorder)
        few.gradients(*p.samples[:2], p.options, variant.need, state, state.loss, kernels=recorder)
    elif variant.call == "distance_sums":
        launch.distance_sums(p, machine=machine)
    elif variant.call == "slope_sums":
        assert moments is not None
        launch.slope_sums(p, moments, machine=machine)
    else:
        launch.loss_and_gradients(p, moments, *variant.need, machine=machine)
    return next(x for x in recorder.launches if x.kernel == variant.kernel)


def machine_code(kernel: Any, work: Launch, capability: int) -> tuple[bytes, int]:
    """The cubin of a kernel and its shared bytes, compiled as Triton would on launching it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    if not isinstance(kernel, JITFunction):
        raise RuntimeError("TRITON_INTERPRET is set: there is nothing to compile; unset it")
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*work.arguments, **work.keywords)
    parsed, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, options)
    source = ASTSource(kernel, signature, constants, attributes)
    # A cached result would be that of another source or compiler, if Triton's key ever missed a difference.
    with triton.knobs.cache.scope(), triton.knobs.compilation.scope(), tempfile.TemporaryDirectory() as cache:
        triton.knobs.cache.dir = cache
        triton.knobs.compilation.always_compile = True
        compiled = triton.compile(source, target=target, options=parsed.__dict__)
        return compiled.asm["cubin"], compiled.metadata.shared


def compiled(name: str, capability: int) -> tuple[bytes, int]:
    """VARIANTS[name] compiled for compute capability / 10: the cubin and its shared bytes."""
    from sadm_kernels.triton import device_code, few_code

    variant = VARIANTS[name]
    code = few_code if variant.call == "few" else device_code
    return machine_code(getattr(code, variant.kernel), record(variant, capability), capability)


def compile_variant(name: str, capability: int) -> Usage:
    """Compile VARIANTS[name] for compute capability / 10 and read off what it takes."""
    return usage_of(*compiled(name, capability))


def usage_of(cubin: bytes, shared: int) -> Usage:
    """Read off what compiled code takes."""
    import triton

    usage, code = _read(cubin, triton.knobs.nvidia.cuobjdump.path, "-res-usage"), disassembled(cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return Usage(
        registers=int(found[1]),
        stack=int(found[2]),
        local=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        shared=shared,
        matrix=sorted(set(re.findall(r"\b[A-Z]+MMA\b", code)) - {"FMMA"}),
    )


def disassembled(cubin: bytes) -> str:
    """The instructions of compiled code, as text."""
    import triton

    return _read(cubin, triton.knobs.nvidia.nvdisasm.path, "-c")


def _read(cubin: bytes, *command: str) -> str:
    """What one of NVIDIA's tools says of compiled code."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run([*command, str(path)], check=True, capture_output=True, text=True).stdout


def main() -> None:
    import triton

    parser = argparse.ArgumentParser(description="Compile all kernel variants for sm_80, sm_90 and sm_100.")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the result into this budget file")
    path = parser.parse_args().write
    result: dict[str, dict[str, dict[str, Any]]] = {}
    sys.stdout.write(f"triton {triton.__version__}\n")
    sys.stdout.write(f"{'variant':32} {'arch':>6} {'registers':>9} {'stack':>6} {'local':>6} {'shared':>7}  matrix\n")
    for name in VARIANTS:
        for capability in ARCHITECTURES:
            usage = compile_variant(name, capability)
            result.setdefault(name, {})[f"sm_{capability}"] = usage._asdict()
            sys.stdout.write(
                f"{name:32} sm_{capability:<3} {usage.registers:9} {usage.stack:6} {usage.local:6} {usage.shared:7}  "
                f"{' '.join(usage.matrix)}\n"
            )
            sys.stdout.flush()
    if path is not None:
        budgets = json.loads(path.read_text()) if path.exists() else {}
        budgets[triton.__version__] = result
        path.write_text(json.dumps(budgets, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
