"""Structure-guided adversarial training of diffusion models (SADM, arXiv 2402.17563)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sadm_fast.api import load, train
    from sadm_fast.data.samples import Arrays, SampleSource
    from sadm_fast.errors import UserError
    from sadm_fast.models import Denoiser, StructureEncoder
    from sadm_kernels import StructureLoss

__all__ = [
    "Arrays",
    "Denoiser",
    "SampleSource",
    "StructureEncoder",
    "StructureLoss",
    "UserError",
    "load",
    "train",
]
_HOMES = {
    "Arrays": "sadm_fast.data.samples",
    "Denoiser": "sadm_fast.models",
    "SampleSource": "sadm_fast.data.samples",
    "StructureEncoder": "sadm_fast.models",
    "StructureLoss": "sadm_kernels",
    "UserError": "sadm_fast.errors",
    "load": "sadm_fast.api",
    "train": "sadm_fast.api",
}


def __getattr__(name: str) -> Any:
    """Import on first use: torch takes seconds, and `--help` should not."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
