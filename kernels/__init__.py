"""Fused structure loss of SADM: a drop-in for any PyTorch loop. Needs torch only."""

from sadm_kernels.api import StructureLoss, backends, share, structure_loss
from sadm_kernels.columns import Queue
from sadm_kernels.reference import relation_matrix
from sadm_kernels.streams import copy_rows, has_streams, philox_uniform

__all__ = [
    "Queue",
    "StructureLoss",
    "backends",
    "copy_rows",
    "has_streams",
    "philox_uniform",
    "relation_matrix",
    "share",
    "structure_loss",
]
