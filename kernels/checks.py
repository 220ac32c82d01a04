"""Checks of what a caller passes: a ValueError names the argument, its value, and what it must be."""

import math
import numbers
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sadm_kernels import reference
from sadm_kernels.capabilities import IMPLEMENTATIONS, transformed
from sadm_kernels.samples import Samples

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (
    *(torch.bool, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
)


def check_options(relation: str, penalty: str, normalize: str, tau: Any, delta: Any, impl: str) -> None:
    """ValueError unless every option is one that the reference knows and tau and delta are positive numbers."""
    _check_choice("relation", relation, reference.RELATIONS)
    _check_choice("penalty", penalty, reference.PENALTIES)
    _check_choice("normalize", normalize, reference.NORMALIZATIONS)
    _check_choice("impl", impl, IMPLEMENTATIONS)
    _check_positive("tau", tau)
    _check_positive("delta", delta)


def check_group(group: dist.ProcessGroup | None) -> None:
    """ValueError unless `group` is None or a process group with this rank in it."""
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            f"group: must be a torch.distributed.ProcessGroup that has this rank, or None, not {type(group).__name__}"
        )


def check_rows(name: str, features: Tensor) -> None:
    """ValueError unless features are a dense float tensor [B, d]."""
    _check_tensor(name, features)
    if features.dim() != 2:
        raise ValueError(f"{name}.shape={tuple(features.shape)}: must be [B, d], one feature row a sample")
    if features.dtype not in _FLOATS:
        raise ValueError(f"{name}.dtype={features.dtype}: must be float16, bfloat16, float32 or float64")


def check_features(real: Tensor, fake: Tensor, of: str = "") -> None:
    """ValueError unless both are dense float tensors [B, d] with equal B and device. of: prefix for their names."""
    check_rows(f"{of}real", real)
    check_rows(f"{of}fake", fake)
    if len(real) != len(fake):
        raise ValueError(
            f"{of}real.shape={tuple(real.shape)} but {of}fake.shape={tuple(fake.shape)}:"
            " row i of both belongs to sample i, so they must have as many rows"
        )
    if real.device != fake.device:
        raise ValueError(f"{of}real.device={real.device} but {of}fake.device={fake.device}: must be the same")


def check_batch(batch: Samples, alone: bool) -> None:
    """ValueError unless weight and labels fit the features. alone: no other rank can have the positive weight."""
    check_features(batch.real, batch.fake)
    if batch.weight is not None:
        some_weight = _check_weight("weight", batch.weight, batch.real)
        if alone and not some_weight:
            raise ValueError(f"weight: all {len(batch.weight)} are zero, at least one must be positive")
    if batch.labels is not None:
        _check_labels("labels", batch.labels, batch.real)


def check_queue(queue: Samples | None, batch: Samples) -> Samples | None:
    """ValueError unless the queue fits the batch. Returns it, or None if it is empty."""
    if queue is None:
        return None
    if not isinstance(queue, Samples):
        raise ValueError(f"queue: must be a sadm_kernels.Queue, not {type(queue).__name__}")
    check_features(queue.real, queue.fake, "queue.")
    for side, past, now in (("real", queue.real, batch.real), ("fake", queue.fake, batch.fake)):
        if past.shape[1] != now.shape[1]:
            shape = tuple(past.shape)
            raise ValueError(f"queue.{side}.shape={shape}: must be [q, {now.shape[1]}], as wide as {side}")
    if queue.real.device != batch.real.device:
        raise ValueError(f"queue.real.device={queue.real.device}: must be {batch.real.device}, where the features are")
    if queue.weight is not None:
        _check_weight("queue.weight", queue.weight, queue.real)
    if (queue.labels is None) != (batch.labels is None):
        there, missing = ("queue.labels", "labels") if batch.labels is None else ("labels", "queue.labels")
        raise ValueError(f"{missing}=None: must be given with {there}, or neither")
    if queue.labels is not None:
        _check_labels("queue.labels", queue.labels, queue.real)
    for name, x in queue._asdict().items():
        if x is not None and x.requires_grad:
            raise ValueError(f"queue.{name}.requires_grad=True: the past has no gradient; use queue.{name}.detach()")
    return queue if len(queue.real) else None


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(allowed)}")


def _check_positive(name: str, value: Any) -> None:
    """ValueError unless value is a positive number: a real one, or a 0-d float tensor that asks for no gradient."""
    if isinstance(value, Tensor):
        if value.requires_grad:
            raise ValueError(f"{name}.requires_grad=True: {name} gets no gradient; use {name}.item()")
        real = value.dim() == 0 and value.dtype in _FLOATS and value.device.type != "meta"
    else:
        real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    try:
        number = float(value) if real else math.nan
    except OverflowError:  # an integer beyond a float's range
        number = math.inf
    # Comparisons, not math.isfinite: torch.compile hands in a symbol when the number differs between calls.
    if not 0 < number < math.inf:
        raise ValueError(f"{name}={value!r}: must be a positive number")


def _check_tensor(name: str, x: Any) -> None:
    """ValueError unless x is a dense tensor of this rank alone."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name}: must be a torch.Tensor, not {type(x).__name__}")
    if type(x).__name__ == "DTensor":
        raise ValueError(f"{name} is a DTensor: pass {name}.to_local() and the process group as group=")
    if x.is_nested:
        raise ValueError(f"{name} is a nested tensor: must have as many features in every row")
    if x.layout != torch.strided:
        raise ValueError(f"{name}.layout={x.layout}: must be dense; use {name}.to_dense()")


def _check_entries(name: str, x: Tensor, features: Tensor) -> None:
    _check_tensor(name, x)
    if x.shape != features.shape[:1]:
        raise ValueError(f"{name}.shape={tuple(x.shape)}: must be [{len(features)}], one entry a sample")
    if x.device != features.device:
        raise ValueError(f"{name}.device={x.device}: must be {features.device}, where the features are")


def _check_labels(name: str, labels: Tensor, features: Tensor) -> None:
    _check_entries(name, labels, features)
    if labels.dtype not in _INTEGERS:
        raise ValueError(f"{name}.dtype={labels.dtype}: must be an integer type")


def _check_weight(name: str, weight: Tensor, features: Tensor) -> bool:
    """Check the weights; return whether any is positive. All zeros are legal on one rank of a group.

    Values are looked at on the CPU only: on an accelerator that would wait for the device.
    """
    _check_entries(name, weight, features)
    if weight.dtype not in (*_FLOATS, *_INTEGERS):
        raise ValueError(f"{name}.dtype={weight.dtype}: must be a float type of 16 to 64 bits or an integer type")
    if not len(weight) or not _has_values(weight):
        return True
    values = weight.detach() if weight.dtype.is_floating_point else weight.double()
    low, high = map(float, values.aminmax())
    for extreme in (low, high):
        if not math.isfinite(extreme):
            raise ValueError(f"{name}: has {extreme}, must be finite")
    if low < 0:
        raise ValueError(f"{name}: has {low}, must not be negative")
    return high > 0


def _has_values(x: Tensor) -> bool:
    """Whether x has numbers to look at now: not while something traces or transforms, nor on another device."""
    plain = type(x) is Tensor or type(x) is torch.nn.Parameter
    return plain and x.device.type == "cpu" and not torch.compiler.is_compiling() and not transformed(x)
