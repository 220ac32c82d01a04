"""Feeding a trainer: random numbers from counters, by Triton or the C++ library, and rows of memory, by the latter."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from sadm_kernels import native, triton


def has_streams() -> bool:
    """Whether the C++ library is there; without it the functions below for CPUs raise RuntimeError."""
    return native.why_missing() == "ok"


def philox_uniform(key: int, stream: int, sample_ids: Tensor, count: int) -> Tensor:
    """Philox4x32-10 as uniform numbers in (0, 1]: float32 [B, count] for int64 sample_ids [B] on the CPU.

    Number 4 b + w of sample n is word w of counter (b, stream, n low, n high) under the 64-bit key, as
    (word + 1/2) 2^-32 rounded to float32.
    """
    ids = sample_ids.to("cpu", torch.int64).contiguous()
    out = torch.empty(len(ids), count, dtype=torch.float32, device="cpu")
    native.library().philox_uniform(
        ids.data_ptr(), len(ids), count, stream, key % 2**64, out.data_ptr(), native.threads()
    )
    return out


def philox_first(key: int, streams: Sequence[int], sample_ids: Tensor) -> Tensor:
    """The first number of each stream: float64 [len(streams), B] in (0, 1) for int64 sample_ids [B] on the CPU.

    It is (word + 1/2) 2^-32 of word 0 of counter (0, stream, n low, n high), exactly.
    """
    ids = sample_ids.to("cpu", torch.int64).contiguous()
    out = torch.empty(len(streams), len(ids), dtype=torch.float64, device="cpu")
    numbers = (ctypes.c_int64 * len(streams))(*streams)
    native.library().philox_first(ids.data_ptr(), len(ids), numbers, len(streams), key % 2**64, out.data_ptr())
    return out


def draws_on(device: torch.device) -> bool:
    """Whether `philox_draw` can be used there: on a GPU with Triton."""
    return device.type == "cuda" and triton.why_missing() == "ok"


def philox_draw(
    key: int, stream: int, firsts: tuple[int, int], sample_ids: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Normal numbers of one stream and the first uniform ones of two others, in one launch on a GPU.

    Returns float32 [B, count], by Box-Muller: numbers i and ceil(count / 2) + i of the stream, as `philox_uniform`
    has them, give the radius and the angle of normal numbers i (cosine) and ceil(count / 2) + i (sine); and float64
    [2, B], as `philox_first` has them. sample_ids: int64 [B].
    """
    from sadm_kernels.triton import random

    return random.draw(key % 2**64, stream, firsts, sample_ids.to(torch.int64).contiguous(), count)


def philox_keep(key: int, stream: int, sample_ids: Tensor, count: int, rate: float) -> Tensor:
    """Where `philox_uniform`'s numbers are at least `rate`: bool [B, count] for int64 sample_ids [B] on a GPU."""
    from sadm_kernels.triton import random

    return random.keep(key % 2**64, stream, sample_ids.to(torch.int64).contiguous(), count, rate)


def copy_rows(addresses: Tensor, row_bytes: int, out_address: int) -> None:
    """Copy len(addresses) rows of memory, from int64 `addresses` [n], one behind the other to out_address.

    Nothing is checked: the caller keeps both ends alive and within bounds. Other threads run meanwhile.
    """
    native.library().copy_rows(addresses.data_ptr(), len(addresses), row_bytes, out_address)
