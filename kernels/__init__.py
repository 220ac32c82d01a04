"""Fused structure loss of SADM: a drop-in for any PyTorch loop. Needs torch only."""

from sadm_kernels.api import StructureLoss, backends, structure_loss
from sadm_kernels.reference import relation_matrix

__all__ = ["StructureLoss", "backends", "relation_matrix", "structure_loss"]
