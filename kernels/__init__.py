"""Fused structure loss of SADM: a drop-in for any PyTorch loop. Needs torch only."""

from sadm_kernels.api import StructureLoss, relation_matrix, share, structure_loss
from sadm_kernels.capabilities import backends
from sadm_kernels.samples import Queue

__all__ = [
    "Queue",
    "StructureLoss",
    "backends",
    "relation_matrix",
    "share",
    "structure_loss",
]
