"""Fused structure loss of SADM: a drop-in for any PyTorch loop. Needs torch only."""

from sadm_kernels.api import StructureLoss, backends, structure_loss
from sadm_kernels.reference import relation_matrix
from sadm_kernels.streams import copy_rows, has_streams, philox_uniform

__all__ = [
    "StructureLoss",
    "backends",
    "copy_rows",
    "has_streams",
    "philox_uniform",
    "relation_matrix",
    "structure_loss",
]
