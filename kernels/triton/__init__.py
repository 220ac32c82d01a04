"""The structure loss on NVIDIA GPUs. Importing this does not import triton; the first call does."""

from functools import cache
from importlib.util import find_spec

import torch

from sadm_kernels.triton import few
from sadm_kernels.triton.launch import distance_sums, loss_and_gradients, slope_sums

__all__ = ["distance_sums", "few", "loss_and_gradients", "slope_sums", "why_missing"]


@cache  # asked by every call of the loss on a GPU
def why_missing() -> str:
    """ "ok", or one line: why the kernels cannot run here, and what to do."""
    if find_spec("triton") is None:
        return "triton is not installed: pip install triton, or torch's CUDA build, which brings it"
    if torch.version.hip is not None:
        return "this is torch for ROCm, and the kernels are for NVIDIA GPUs only: use impl='reference'"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device: check nvidia-smi and that torch is a CUDA build, or use impl='reference'"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        name = torch.cuda.get_device_name()
        return f"{name} has compute capability {major}.{minor}, must be 8.0 or newer: use impl='reference'"
    return "ok"
