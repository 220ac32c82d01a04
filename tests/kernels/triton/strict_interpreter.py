"""Triton's interpreter, made to fail where a GPU would.

As it comes, the interpreter computes bfloat16 on its bit patterns, reads beyond tensors, fills masked lanes with 0,
takes tf32 for float32, keeps a float argument in float64, rounds fused multiply-adds twice and sums of a matrix product
to nearest, contracts nothing and knows no races: its programs run one after the other.
`strict_mode` corrects or refuses all that, for interpreted kernels only; kernels compiled in the same process are not
touched, and everything it changes is put back. It stands on private parts of Triton and therefore refuses versions it
was not written against.

It does not see: races between the threads of one program, layouts, shared memory, registers, speed.
"""

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

SUPPORTED = ("3.7.1", "3.8.0")
_SHARED = "sadm_kernels.triton.pair_code"  # functions that kernels of several modules call


class StrictError(Exception):
    """What a kernel did that a GPU would not forgive. Triton wraps it into its InterpreterError, message included."""


def unsupported() -> str | None:
    """Why there is no strict mode here, or None."""
    if importlib.util.find_spec("triton") is None:
        return f"needs triton {' or '.join(SUPPORTED)}, none is installed"
    import triton

    if triton.__version__ not in SUPPORTED:
        return f"triton {triton.__version__}: the strict interpreter knows {' and '.join(SUPPORTED)} only; adapt it"
    return None


def _from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _to_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 -> bits, to nearest, ties to even."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def _to_tf32(x: np.ndarray) -> np.ndarray:
    """float32 with 10 bits of fraction left, to nearest."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    return np.where(np.isfinite(x), ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32), x)


def _product(factors: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Of float32 factors, exact."""
    return factors[0].astype(np.float64) * factors[1]


def _accumulated(x: np.ndarray, y: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """sums + x y as tensor cores add it up: 16 products at a time, everything cut off towards zero.

    Products of 16-bit floats are exact. Those of a step and the sum so far are aligned to the largest and keep two bits
    more than float32 has, as on Hopper at least (Fasi et al. 2021, "Numerical behavior of NVIDIA tensor cores").
    """
    for k in range(0, x.shape[-1], 16):
        terms = x[..., :, k : k + 16, None].astype(np.float64) * y[..., None, k : k + 16, :]
        terms = np.concatenate([terms, sums[..., :, None, :].astype(np.float64)], axis=-2)
        largest = np.abs(terms).max(axis=-2, keepdims=True)
        last = np.exp2(np.floor(np.log2(np.where((largest > 0) & np.isfinite(largest), largest, 1.0))) - 25)
        exact = (np.trunc(terms / last) * last).sum(axis=-2)
        sums = exact.astype(np.float32)
        sums = np.where(np.abs(sums) > np.abs(exact), np.nextafter(sums, np.float32(0)), sums)
    return sums


class _Memory:
    """The tensors of one launch, and which program has read and written each byte of them."""

    NOBODY, MANY = -1, -2

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        spans = []
        for t in tensors:
            if t.numel():
                last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
                spans.append((t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()))
        spans.sort()
        merged: list[tuple[int, int]] = []
        for start, end in spans:
            # Tensors that only touch stay apart, but an offset that leaves one for the other is not noticed.
            if merged and start < merged[-1][1]:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            else:
                merged.append((start, end))
        self.starts = np.array([start for start, _ in merged], dtype=np.uint64)
        self.ends = np.array([end for _, end in merged], dtype=np.uint64)
        self.readers = [np.full(end - start, self.NOBODY, dtype=np.int64) for start, end in merged]
        self.writers = [np.full(end - start, self.NOBODY, dtype=np.int64) for start, end in merged]
        self.loaded = self.stored = 0  # bytes, one that is loaded twice counting twice

    def _cells(self, addresses: np.ndarray, size: int) -> Iterator[tuple[int, np.ndarray]]:
        """Region and byte offsets of the elements at `addresses`; StrictError for those in no tensor."""
        region = np.searchsorted(self.starts, addresses, side="right").astype(np.int64) - 1
        inside = region >= 0
        inside[inside] = addresses[inside] + np.uint64(size) <= self.ends[region[inside]]
        if not inside.all():
            raise StrictError(f"out of bounds: {int((~inside).sum())} of {len(addresses)} elements in no tensor")
        for r in np.unique(region):
            offsets = (addresses[region == r] - self.starts[r]).astype(np.int64)
            yield int(r), (offsets[:, None] + np.arange(size)).ravel()

    def load(self, program: int, addresses: np.ndarray, size: int) -> None:
        self.loaded += size * addresses.size
        for r, cells in self._cells(addresses, size):
            if (self.writers[r][cells] != self.NOBODY).any():
                raise StrictError("race: a program reads what a program of the same launch has written")
            before = self.readers[r][cells]
            self.readers[r][cells] = np.where((before == self.NOBODY) | (before == program), program, self.MANY)

    def store(self, program: int, addresses: np.ndarray, size: int) -> None:
        self.stored += size * addresses.size
        if len(np.unique(addresses)) < len(addresses):
            raise StrictError("race: two elements of one store have the same address")
        for r, cells in self._cells(addresses, size):
            for seen, verb in ((self.writers[r][cells], "written"), (self.readers[r][cells], "read")):
                if ((seen != self.NOBODY) & (seen != program)).any():
                    raise StrictError(f"race: a program writes what another one of the same launch has {verb}")
            self.writers[r][cells] = program


@cache  # with what the interpreter makes of their source, which takes a third of a short test
def _interpreted(path: Path) -> ModuleType:
    """A module whose kernels were made inside strict_mode."""
    spec = importlib.util.spec_from_file_location(f"strict_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    compiled = sys.modules.pop(_SHARED, None)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.modules.pop(_SHARED, None)
        if compiled is not None:
            sys.modules[_SHARED] = compiled
    return module


class Strict:
    """What `strict_mode` gives: kernels made from functions or modules, and the order in which programs run."""

    def __init__(self) -> None:
        self.order_seed: int | None = None
        self.memory = _Memory([])
        self.program = 0
        self.contracts = False  # whether the compiler may make fused multiply-adds of the running kernel
        self._order: np.ndarray | None = None

    def shuffle(self, seed: int) -> None:
        """Run the programs of each later launch in a random order."""
        self.order_seed = seed

    def jit(self, function: Callable[..., None]) -> Any:
        """An interpreted kernel, whatever `triton.jit` would make of the function now."""
        from triton.runtime.interpreter import InterpretedFunction

        return InterpretedFunction(function)

    def load(self, path: str | Path) -> ModuleType:
        """The module at `path` with its kernels interpreted, apart from the one that `import` gives.

        What it imports of _SHARED is interpreted, too.
        """
        return _interpreted(Path(path))

    def begin(self, programs: int) -> None:
        """A launch starts."""
        self._order = None
        if self.order_seed is not None:
            self._order = np.random.default_rng(self.order_seed).permutation(programs)

    def turn(self, number: int) -> int:
        """Which program is the next one to run."""
        self.program = number if self._order is None else int(self._order[number])
        return self.program


def _corrections(strict: Strict) -> dict[str, Any]:
    """Methods for InterpreterBuilder."""
    import triton.language as tl
    from triton._C.libtriton import interpreter as native
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import min_dot_size
    from triton.runtime import interpreter

    Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle

    def without_bfloat16(name: str) -> Any:
        original = getattr(Builder, name)

        def checked(self, *arguments):
            for x in arguments:
                if isinstance(x, Handle) and x.data.dtype == np.uint16 and x.dtype.scalar == tl.bfloat16:
                    raise StrictError(f"{name} on bfloat16: convert to float32 first")
            return original(self, *arguments)

        return checked

    checked_binary = without_bfloat16("binary_op")

    def binary_op(self, lhs, rhs, op):
        result = checked_binary(self, lhs, rhs, op)
        if not strict.contracts or result.data.dtype != np.float32 or op not in (np.multiply, np.add, np.subtract):
            return result
        if op is np.multiply:
            result.factors = lhs.data, rhs.data
            return result
        sign = -1.0 if op is np.subtract else 1.0
        if hasattr(lhs, "factors"):
            exact = _product(lhs.factors) + sign * rhs.data
        elif hasattr(rhs, "factors"):
            exact = lhs.data + sign * _product(rhs.factors)
        else:
            return result
        return Handle(exact.astype(np.float32), result.dtype)

    def cast_impl(self, src, dst_type, *_rounding):
        source, target = src.dtype.scalar, dst_type.scalar
        data = _from_bfloat16(src.data) if source == tl.bfloat16 else src.data
        if target == tl.bfloat16:
            return Handle(src.data if source == tl.bfloat16 else _to_bfloat16(data.astype(np.float32)), target)
        return Handle(data.astype(interpreter._get_np_dtype(dst_type)), target)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if a.dtype.scalar not in (tl.float16, tl.bfloat16, tl.float32):
            raise StrictError(f"dot of {a.dtype}: not modelled")
        x, y = (_from_bfloat16(m.data) if m.dtype.scalar == tl.bfloat16 else m.data.astype(np.float32) for m in (a, b))
        if a.dtype.scalar == tl.float32 and input_precision != ir.INPUT_PRECISION.IEEE:
            x_large, y_large = _to_tf32(x), _to_tf32(y)
            product = x_large @ y_large
            if input_precision == ir.INPUT_PRECISION.TF32x3:
                product = (x_large @ _to_tf32(y - y_large) + _to_tf32(x - x_large) @ y_large) + product
            elif input_precision != ir.INPUT_PRECISION.TF32:
                raise StrictError(f"dot with {input_precision}: not modelled")
        else:
            return Handle(_accumulated(x, y, d.data), d.dtype.scalar)
        return Handle(product + d.data, d.dtype.scalar)

    def create_masked_load(self, ptrs, mask, other, cache_modifier, eviction_policy, is_volatile):
        dtype = ptrs.get_element_ty()
        np_dtype = interpreter._get_np_dtype(dtype)
        addresses, active = np.broadcast_arrays(ptrs.data, mask.data)
        strict.memory.load(strict.program, addresses[active.astype(bool)], np_dtype.itemsize)
        if other is None:
            # Undefined on a GPU: the worst there is.
            if dtype == tl.bfloat16:
                value = np.uint16(0x7FC0)
            elif np.issubdtype(np_dtype, np.floating):
                value = np_dtype.type(np.nan)
            else:
                value = np_dtype.type(True) if np_dtype == np.bool_ else np_dtype.type(np.iinfo(np_dtype).max)
            other = Handle(np.full(ptrs.data.shape, value, dtype=np_dtype), dtype)
        return Handle(native.load(ptrs.data, mask.data, other.data, np_dtype), dtype)

    def create_masked_store(self, ptrs, value, mask, cache_modifier, eviction_policy):
        np_dtype = interpreter._get_np_dtype(ptrs.get_element_ty())
        addresses, active = np.broadcast_arrays(ptrs.data, mask.data)
        strict.memory.store(strict.program, addresses[active.astype(bool)], np_dtype.itemsize)
        return native.store(ptrs.data, value.data, mask.data)

    def create_fma(self, a, b, c):
        # Products of floats are exact in float64: one rounding, and in rare cases a second one of 2^-29 as much.
        if a.data.dtype != np.float32:
            raise StrictError(f"fma of {a.dtype}: not modelled")
        return Handle((a.data.astype(np.float64) * b.data + c.data).astype(np.float32), a.dtype.scalar)

    def no_atomics(self, *_arguments):
        raise StrictError("atomic: its order, and so a float's value, changes from run to run")

    original_dim, original_idx = Builder.set_grid_dim, Builder.set_grid_idx

    def set_grid_dim(self, nx, ny, nz):
        original_dim(self, nx, ny, nz)
        strict.begin(nx * ny * nz)

    def set_grid_idx(self, x, y, z):
        _, ny, nz = self.grid_dim
        number = strict.turn((x * ny + y) * nz + z)
        original_idx(self, number // (ny * nz), number // nz % ny, number % nz)

    return {
        **{name: without_bfloat16(name) for name in ("unary_op", "create_fabs")},
        "binary_op": binary_op,
        "cast_impl": cast_impl,
        "create_fp_to_fp": cast_impl,
        "create_dot": create_dot,
        "create_fma": create_fma,
        "create_masked_load": create_masked_load,
        "create_masked_store": create_masked_store,
        "create_atomic_rmw": no_atomics,
        "create_atomic_cas": no_atomics,
        "set_grid_dim": set_grid_dim,
        "set_grid_idx": set_grid_idx,
        "min_dot_size": min_dot_size(GPUTarget("cuda", 90, 32)),
    }


def _restore(namespace: Any, before: dict[str, Any]) -> None:
    """Undo what was done to a module or a class."""
    for name in set(vars(namespace)) | set(before):
        if name not in before:
            delattr(namespace, name)
        elif vars(namespace).get(name) is not before[name]:
            setattr(namespace, name, before[name])


def _forget_tritons_own() -> None:
    """Rewritten functions of Triton's modules, which lose what they need of the interpreter when all is put back."""
    from triton.runtime.interpreter import InterpretedFunction

    rewritten = InterpretedFunction.rewritten_fn
    for function in [function for function in rewritten if function.__module__.startswith("triton.")]:
        del rewritten[function]


@contextlib.contextmanager
def strict_mode() -> Iterator[Strict]:
    """Interpreted kernels are strict inside; RuntimeError on a version of Triton it does not know."""
    reason = unsupported()
    if reason is not None:
        raise RuntimeError(reason)
    import triton
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.jit import JITFunction

    strict = Strict()
    Builder, Executor, Reduce = (
        interpreter.InterpreterBuilder,
        interpreter.GridExecutor,
        interpreter.ReduceScanOpInterface,
    )
    touched: list[Any] = [tl, tl.core, tl.math, tl.standard, tl.tensor, tl.dtype, tl.core.tensor_descriptor_base]
    touched += [interpreter, Builder, Executor, Reduce]
    before = [(namespace, dict(vars(namespace))) for namespace in touched]
    codegen_before = dict(interpreter.interpreter_builder.codegen_fns)
    numpy_before = np.seterr(all="ignore")  # kernels compute with NaN and infinity on purpose
    # The global switch fills what torch.empty returns with NaN, or the largest integer.
    deterministic_before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fill_before = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]

    original_init, original_apply, original_cvt = Executor._init_args_hst, Reduce.apply, interpreter._implicit_cvt
    original_call = Executor.__call__

    def call(self, *args, **kwargs):
        strict.contracts = kwargs.get("enable_fp_fusion", True)  # Triton's default
        return original_call(self, *args, **kwargs)

    def implicit_cvt(arg):
        if isinstance(arg, float):
            return tl.tensor(interpreter.TensorHandle(np.array([arg], np.float32), tl.float32), tl.float32)
        return original_cvt(arg)

    def init_args(self, args, kwargs):
        args, kwargs = original_init(self, args, kwargs)
        strict.memory = _Memory([x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)])
        return args, kwargs

    def apply(self, input):
        for x in input if isinstance(input, tuple) else (input,):
            if x.dtype.scalar == tl.bfloat16:
                raise StrictError("reduction of bfloat16: convert to float32 first")
        return original_apply(self, input)

    with triton.knobs.runtime.scope():
        try:
            triton.knobs.runtime.interpret = True
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
            corrections = _corrections(strict)
            interpreter.interpreter_builder.codegen_fns["min_dot_size"] = corrections.pop("min_dot_size")
            for name, method in corrections.items():
                setattr(Builder, name, method)
            Executor._init_args_hst, Reduce.apply, interpreter._implicit_cvt = init_args, apply, implicit_cvt
            Executor.__call__ = call
            # tl.sum and its like were compiled kernels' functions when triton was imported.
            for namespace in (tl.standard, tl):
                for name, function in list(vars(namespace).items()):
                    if isinstance(function, JITFunction):
                        setattr(namespace, name, strict.jit(function.fn))
            # Once for all, where the interpreter would do it for each call of each function, and leave some of it.
            interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
            interpreter._patch_lang = lambda function: interpreter._LangPatchScope()
            _forget_tritons_own()
            yield strict
        finally:
            _forget_tritons_own()
            interpreter.interpreter_builder.codegen_fns = codegen_before
            for namespace, attributes in reversed(before):
                _restore(namespace, attributes)
            torch.use_deterministic_algorithms(deterministic_before[0], warn_only=deterministic_before[1])
            torch.utils.deterministic.fill_uninitialized_memory = fill_before  # type: ignore[attr-defined]
            np.seterr(**numpy_before)


@pytest.fixture
def strict() -> Iterator[Strict]:
    """`strict_mode` for a test; skipped, with the reason, where it cannot be."""
    reason = unsupported()
    if reason is not None:
        pytest.skip(reason)
    with strict_mode() as mode:
        yield mode
