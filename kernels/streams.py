"""Feeding a trainer on a CPU: random numbers from counters, and rows of memory, by the C++ library if it is built."""

import torch
from torch import Tensor

from sadm_kernels import native


def has_streams() -> bool:
    """Whether the C++ library is there; without it the functions below raise RuntimeError."""
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


def copy_rows(addresses: Tensor, row_bytes: int, out_address: int) -> None:
    """Copy len(addresses) rows of memory, from int64 `addresses` [n], one behind the other to out_address.

    Nothing is checked: the caller keeps both ends alive and within bounds. Other threads run meanwhile.
    """
    native.library().copy_rows(addresses.data_ptr(), len(addresses), row_bytes, out_address)
