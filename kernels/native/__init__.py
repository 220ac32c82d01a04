"""The fused loss on CPUs: calls the C++ library that CMakeLists.txt builds into this folder, without a copy.

Features in float32 and float64, and bfloat16 (products in bfloat16 where the processor has them, sums in float32);
float16 is widened first. Results are the same to the last bit for every number of threads.
"""

import ctypes
import os
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from sadm_kernels.samples import Pairs, compute_dtype
from sadm_kernels.scaling import common_scale, row_scale

_INTERFACE = 5  # kInterface of structure.h
_FOLDER = Path(__file__).parent
LIBRARY = _FOLDER / "libstructure.so"
BUILD_FAILURE = _FOLDER / "build_failure.txt"  # setup.py leaves the reason here
_REMEDY = "install it with a C++17 compiler with OpenMP (g++ 9 or newer): pip install ."

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}
_RELATIONS = {"euclidean": 0, "cosine": 1, "gaussian": 2}
_PENALTIES = {"squared": 0, "absolute": 1, "huber": 2}
_DISTANCE_SUMS, _SLOPE_SUMS, _LOSS = range(3)
_NO_MEMORY, _OUT_OF_RANGE = 1, 2
_PROCESS = os.getpid()


class _StructurePass(ctypes.Structure):
    """StructurePass of structure.h, field by field."""

    _fields_ = [
        ("features", ctypes.c_void_p * 2),
        ("weight", ctypes.c_void_p),
        ("labels", ctypes.c_void_p),
        ("gradients", ctypes.c_void_p * 2),
        ("sums", ctypes.c_void_p),
        ("columns", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("first", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("tau", ctypes.c_double),
        ("delta", ctypes.c_double),
        ("inverse_mean", ctypes.c_double * 2),
        ("units", ctypes.c_double * 2),
        ("mean_slope", ctypes.c_double * 2),
        ("dtype", ctypes.c_int32),
        ("relation", ctypes.c_int32),
        ("penalty", ctypes.c_int32),
        ("unit", ctypes.c_int32),
        ("stage", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("in_range", ctypes.c_int32),
    ]


class AdamWStep(ctypes.Structure):
    """AdamWStep of structure.h, field by field."""

    _fields_ = [
        ("master", ctypes.c_void_p),
        ("gradient", ctypes.c_void_p),
        ("first", ctypes.c_void_p),
        ("second", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("average", ctypes.c_void_p * 4),
        ("norm", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("share", ctypes.c_float * 4),
        ("max_norm", ctypes.c_float),
        ("rest1", ctypes.c_float),
        ("beta2", ctypes.c_float),
        ("rest2", ctypes.c_float),
        ("eps", ctypes.c_float),
        ("kept", ctypes.c_float),
        ("step_size", ctypes.c_float),
        ("root_of_correction", ctypes.c_float),
        ("averages", ctypes.c_int32),
        ("gradient_dtype", ctypes.c_int32),
        ("weight_dtype", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    ]


def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library and "ok", or None and why there is none."""
    if not LIBRARY.exists():
        if BUILD_FAILURE.exists():
            return None, f"not built when this was installed: {BUILD_FAILURE.read_text().strip()}; {_REMEDY}"
        return None, f"not built: {LIBRARY.name} is not there; {_REMEDY}"
    try:
        library = ctypes.CDLL(str(LIBRARY))  # finds the OpenMP runtime that torch has loaded already
        found = library.structure_interface()
    except (OSError, AttributeError) as error:
        return None, f"cannot load {LIBRARY.name}: {error}; {_REMEDY}"
    if found != _INTERFACE:
        return None, f"{LIBRARY.name} is of another version (interface {found}, not {_INTERFACE}); {_REMEDY}"
    library.structure_instruction_set.restype = ctypes.c_char_p
    library.structure_pass.argtypes = [ctypes.POINTER(_StructurePass)]
    integer, pointer = ctypes.c_int64, ctypes.c_void_p
    library.philox_uniform.argtypes = [
        pointer, integer, integer, ctypes.c_uint32, ctypes.c_uint64, pointer, ctypes.c_int32,
    ]  # fmt: skip
    library.philox_uniform.restype = None
    library.philox_first.argtypes = [pointer, integer, pointer, integer, ctypes.c_uint64, pointer]
    library.philox_first.restype = None
    library.copy_rows.argtypes = [pointer, integer, integer, pointer]
    library.copy_rows.restype = None
    library.adamw_step.argtypes = [ctypes.POINTER(AdamWStep)]
    library.adamw_step.restype = None
    library.sum_of_squares.argtypes = [pointer, integer, ctypes.c_int32, pointer, ctypes.c_int32]
    library.sum_of_squares.restype = ctypes.c_double
    library.restore_if_not_finite.argtypes = [pointer, pointer, pointer, pointer, ctypes.c_int32]
    library.restore_if_not_finite.restype = None
    return library, "ok"


_library, _status = _load()


def why_missing() -> str:
    """ "ok", or why the C++ library cannot be used and what to do."""
    return _status


def library() -> ctypes.CDLL:
    """The library, its functions typed. RuntimeError without it."""
    if _library is None:
        raise RuntimeError(_status)
    return _library


def instruction_set() -> str:
    """What the library runs on this processor: avx512bf16, avx512, avx2 or baseline. RuntimeError without it."""
    if _library is None:
        raise RuntimeError(_status)
    return str(_library.structure_instruction_set().decode())


def _narrow(labels: Tensor) -> Tensor:
    """Labels as int32, equal where they were equal."""
    narrow = labels.to(torch.int32)
    if torch.equal(narrow.to(labels.dtype), labels):
        return narrow
    return torch.unique(labels, return_inverse=True)[1].to(torch.int32)


def threads() -> int:
    """How many threads a call may use: torch's number, but one in a child made by fork.

    GNU's OpenMP would wait there without end for threads that only the parent has; so would torch after such a call.
    """
    if os.getpid() != _PROCESS:
        return 1
    number = torch.get_num_threads()
    if number > 1:
        _protect_children()
    return number


@cache
def _protect_children() -> None:
    """Let torch, too, use one thread in children forked from now on."""
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


def _pass(
    p: Pairs, stage: int, moments: Tensor | None, need_real: bool, need_fake: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """One pass of the library: float64 sums [3] and the gradients [b, d] that are needed, b = len(p.own)."""
    real, fake = (x.float() if x.dtype == torch.float16 else x for x in (p.samples.real, p.samples.fake))
    found = _call(p, real, fake, p.samples.weight, None, stage, moments, need_real, need_fake)
    return found or _scaled_pass(p, real, fake, stage, moments, need_real, need_fake)


def _scaled_pass(
    p: Pairs, real: Tensor, fake: Tensor, stage: int, moments: Tensor | None, need_real: bool, need_fake: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What `_pass` returns for features whose squares leave their range: their largest entries are brought to [1, 2).

    Pairs without a weight get one, so that the float32 sums of large differences stay in range as well.
    """
    unit, compute = p.options.unit, compute_dtype(real)
    scales = [row_scale(x.to(compute)) if unit else common_scale(x.to(compute)) for x in (real, fake)]
    real, fake = ((x.to(compute) / scale).to(x.dtype) for x, scale in zip((real, fake), scales, strict=True))
    weight, pair = p.samples.weight, 1.0
    if weight is None:
        bits = len(real).bit_length()
        weight, pair = real.new_full((len(real),), 0.5**bits, dtype=compute), 4.0**bits
    units = (1.0, 1.0) if unit else (float(scales[0]), float(scales[1]))
    found = _call(p, real, fake, weight, units, stage, moments, need_real, need_fake)
    assert found is not None
    sums, *gradients = found
    for x, scale in zip(gradients, scales, strict=True):
        if x is not None:
            x.mul_(pair)
            if unit:
                x.div_(scale[p.own.start : p.own.stop])
    return sums * pair, gradients[0], gradients[1]


def _call(
    p: Pairs,
    real: Tensor,
    fake: Tensor,
    weight: Tensor | None,
    units: tuple[float, float] | None,
    stage: int,
    moments: Tensor | None,
    need_real: bool,
    need_fake: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
    """The library's pass over the columns `real` and `fake`, whose distances are in `units`.

    Without units, features whose squares leave their range are refused: None.
    """
    if _library is None:
        raise RuntimeError(_status)
    compute = torch.float64 if real.dtype == torch.float64 else torch.float32
    labels = p.samples.labels
    if labels is not None and compute == torch.float32:
        labels = _narrow(labels)
    rows, width = len(p.own), real.shape[1]
    # torch.set_default_device must not reach what the library writes to.
    empty = partial(torch.empty, device="cpu")
    gradients = [empty(rows, width, dtype=compute) if need else None for need in (need_real, need_fake)]
    sums = empty(3, dtype=torch.float64)
    inverse_mean, mean_slope = (1.0, 1.0), (0.0, 0.0)
    if moments is not None:
        values = moments.tolist()
        inverse_mean, mean_slope = (values[0], values[1]), (values[2], values[3])

    def address(x: Tensor | None) -> int | None:
        return None if x is None else x.data_ptr()

    task = _StructurePass(
        features=(real.data_ptr(), fake.data_ptr()),
        weight=address(weight),
        labels=address(labels),
        gradients=(address(gradients[0]), address(gradients[1])),
        sums=sums.data_ptr(),
        columns=len(real),
        width=width,
        first=p.own.start,
        rows=rows,
        tau=p.options.tau,
        delta=p.options.delta,
        inverse_mean=inverse_mean,
        units=units or (1.0, 1.0),
        mean_slope=mean_slope,
        dtype=_DTYPES[real.dtype],
        relation=_RELATIONS[p.options.relation],
        penalty=_PENALTIES[p.options.penalty],
        unit=int(p.options.unit),
        stage=stage,
        threads=threads(),
        in_range=int(units is not None),
    )
    status = _library.structure_pass(ctypes.byref(task))
    if status == _OUT_OF_RANGE:
        return None
    if status == _NO_MEMORY:
        raise RuntimeError(f"structure_loss: not enough memory for {len(real)} rows of {width} features")
    return sums, gradients[0], gradients[1]


def distance_sums(p: Pairs) -> Tensor:
    """float64 [3]: the sums of omega D of real, of fake, and of omega, over own rows x all columns."""
    return _pass(p, _DISTANCE_SUMS, None, False, False)[0]


def slope_sums(p: Pairs, moments: Tensor) -> Tensor:
    """float64 [3]: the sums of (dS/du) u of real, of fake, and of omega; u is the distance over its mean."""
    return _pass(p, _SLOPE_SUMS, moments, False, False)[0]


def loss_and_gradients(
    p: Pairs, moments: Tensor | None, need_real: bool, need_fake: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """float64 [2]: the sums of omega rho and of omega; the gradients of the first, [b, d], None where not needed."""
    sums, grad_real, grad_fake = _pass(p, _LOSS, moments, need_real, need_fake)
    return sums[::2], grad_real, grad_fake
