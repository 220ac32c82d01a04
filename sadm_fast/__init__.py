"""Structure-guided adversarial training of diffusion models (SADM, arXiv 2402.17563)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sadm_kernels import StructureLoss

__all__ = ["StructureLoss"]


def __getattr__(name: str) -> Any:
    """Import on first use: torch takes seconds, and `--help` should not."""
    if name == "StructureLoss":
        from sadm_kernels import StructureLoss

        return StructureLoss
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
