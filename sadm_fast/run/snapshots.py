"""Averages that a run keeps beyond their checkpoints (train.ema_snapshot_every), and averages of other lengths made of
them after training: snapshots/power-0.1/step-000500.safetensors, each a whole state of the denoiser.
"""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sadm_fast.ema import posthoc_weights
from sadm_fast.errors import UserError

_NAME = re.compile(r"power-([0-9.e-]+)/step-([0-9]+)\.safetensors")


class Snapshot(NamedTuple):
    """An average of relative width `std` after `step` steps."""

    path: Path
    std: float
    step: int


def snapshot_name(std: float) -> str:
    """The name of a snapshot in the folder, with {step} for its step."""
    return f"power-{std:g}/step-{{step:06d}}.safetensors"


def snapshots_in(folder: Path, last: int) -> list[Snapshot]:
    """The snapshots of steps up to `last`, oldest first."""
    found = []
    for path in folder.glob("power-*/step-*.safetensors"):
        match = _NAME.fullmatch(path.relative_to(folder).as_posix())
        if match and 0 < int(match[2]) <= last:
            found.append(Snapshot(path, float(match[1]), int(match[2])))
    return sorted(found, key=lambda snapshot: (snapshot.step, snapshot.std))


@torch.no_grad()
def reconstructed(folder: Path, step: int, std: float) -> dict[str, Tensor]:
    """The power-function average of relative width `std` after `step` steps, from snapshots: float32, by name.

    Method: Karras et al. 2023, "Analyzing and Improving the Training Dynamics of Diffusion Models", section 3.2.

    Raises:
        UserError: there are no snapshots, they cannot be read, or they cannot give this length.
    """
    found = snapshots_in(folder, step)
    if not found:
        raise UserError(
            f"{folder}: holds no snapshots of averages up to step {step}; train with train.ema_snapshot_every"
        )
    weights, error = posthoc_weights([(s.step, s.std) for s in found], (step, std))
    if error > _MOST_ERROR:
        nearest = ", ".join(sorted({f"{s.std:g}" for s in found}))
        raise UserError(
            f"EMA length {std:g} at step {step}: {len(found)} snapshots (lengths {nearest}) give it with an error of"
            f" {error:.0%} of its profile; ask for a length nearer to them, or keep more (train.ema_snapshot_every,"
            " a second train.ema)"
        )
    with ExitStack() as stack:
        files = []
        for snapshot in found:
            with _reading(snapshot.path):
                files.append(stack.enter_context(safe_open(snapshot.path, framework="pt")))
        state: dict[str, Tensor] = {}
        for name in files[0].keys():  # noqa: SIM118 (not a dict)
            total: Tensor | None = None  # the sum of one tensor at a time is in float64
            for snapshot, weight, file in zip(found, weights, files, strict=True):
                with _reading(snapshot.path):
                    value = file.get_tensor(name).double()
                    total = value * weight if total is None else total.add_(value, alpha=weight)
            assert total is not None
            state[name] = total.float()
    return state


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what goes wrong with a file into a UserError that names it."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]})") from None


# Of the profile's norm. Above it, what is drawn is another length than the one that was asked for.
_MOST_ERROR = 0.1
