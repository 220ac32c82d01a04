"""GPUs by their manufacturer's numbers: peak rates without sparsity, memory, and links to the node's other GPUs."""

import difflib
from typing import NamedTuple

from sadm_fast.errors import UserError


class Gpu(NamedTuple):
    """One GPU. Every number is a peak; programs reach a part of it."""

    name: str
    bf16: float  # FLOP/s, dense, accumulated in fp32
    tf32: float  # FLOP/s, dense
    fp32: float  # FLOP/s, without tensor cores
    memory: float  # bytes
    bandwidth: float  # bytes/s of the memory
    link: float  # bytes/s in one direction to the other GPUs of a node
    link_name: str
    source: str


_TERA, _GIGA = 1e12, 1e9
_NVLINK_3, _NVLINK_4, _NVLINK_5, _PCIE_4 = 300 * _GIGA, 450 * _GIGA, 900 * _GIGA, 32 * _GIGA

GPUS = {
    "a100-40g": Gpu(
        "A100 SXM 40 GB", 312 * _TERA, 156 * _TERA, 19.5 * _TERA, 40 * _GIGA, 1555 * _GIGA, _NVLINK_3,
        "NVLink 3", "NVIDIA A100 datasheet, SXM4 40 GB",
    ),
    "a100": Gpu(
        "A100 SXM 80 GB", 312 * _TERA, 156 * _TERA, 19.5 * _TERA, 80 * _GIGA, 2039 * _GIGA, _NVLINK_3,
        "NVLink 3", "NVIDIA A100 datasheet, SXM4 80 GB",
    ),
    "h100": Gpu(
        "H100 SXM 80 GB", 989 * _TERA, 494 * _TERA, 67 * _TERA, 80 * _GIGA, 3350 * _GIGA, _NVLINK_4,
        "NVLink 4", "NVIDIA H100 datasheet, SXM5; half of the rates with sparsity",
    ),
    "h200": Gpu(
        "H200 SXM 141 GB", 989 * _TERA, 494 * _TERA, 67 * _TERA, 141 * _GIGA, 4800 * _GIGA, _NVLINK_4,
        "NVLink 4", "NVIDIA H200 datasheet, SXM5; half of the rates with sparsity",
    ),
    "b200": Gpu(
        "B200 SXM 180 GB", 2250 * _TERA, 1100 * _TERA, 80 * _TERA, 180 * _GIGA, 8000 * _GIGA, _NVLINK_5,
        "NVLink 5", "NVIDIA HGX B200, 1,000 W; half of the rates with sparsity",
    ),
    "l40s": Gpu(
        "L40S 48 GB", 362 * _TERA, 183 * _TERA, 91.6 * _TERA, 48 * _GIGA, 864 * _GIGA, _PCIE_4,
        "PCIe 4.0 x16", "NVIDIA L40S datasheet",
    ),
    "rtx4090": Gpu(
        "GeForce RTX 4090 24 GB", 165.2 * _TERA, 82.6 * _TERA, 82.6 * _TERA, 24 * _GIGA, 1008 * _GIGA, _PCIE_4,
        "PCIe 4.0 x16", "NVIDIA's Ada whitepaper; it has no direct copies between GPUs",
    ),
}  # fmt: skip


# What a CUDA device calls itself, and its row; the first that is part of the name.
_DEVICES = {
    "H200": "h200",
    "H100 80GB HBM3": "h100",  # PCIe cards are slower
    "B200": "b200",
    "A100-SXM4-40GB": "a100-40g",
    "A100": "a100",
    "L40S": "l40s",
    "RTX 4090": "rtx4090",
}


def of_device(name: str) -> Gpu | None:
    """The row of a device by the name that CUDA gives it, "NVIDIA H200"; None if it is of another kind."""
    key = next((key for part, key in _DEVICES.items() if part in name), None)
    return None if key is None else GPUS[key]


def find_gpu(name: str) -> Gpu:
    """Return the row of `name`, in any case of letters; UserError with the nearest name if there is none."""
    gpu = GPUS.get(name.lower())
    if gpu is None:
        near = difflib.get_close_matches(name.lower(), GPUS, 1, cutoff=0.5)
        suggestion = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"--gpu {name}: unknown GPU; {suggestion}there are {', '.join(GPUS)}")
    return gpu
