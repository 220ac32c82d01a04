"""Structure-guided adversarial training of diffusion models (SADM, arXiv 2402.17563)."""

from sadm_kernels import StructureLoss

__all__ = ["StructureLoss"]
