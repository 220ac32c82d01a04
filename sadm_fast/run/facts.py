"""The facts in run.json: versions, machine, commit, sizes, accuracies."""

import importlib.metadata
import math
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sadm_fast.config import Config
from sadm_fast.data.source import Source
from sadm_fast.files import parse_json

_PACKAGES = ("torch", "deepspeed", "nvidia-dali-cuda130", "triton", "numpy", "diffusers", "sadm_fast")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that have a say in the numbers, those that are installed."""
    found = {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}
    return {name: version for name, version in found.items() if version is not None}


def commit() -> str | None:
    """The commit of the source tree, with "+changes" where files differ from it; None outside a git checkout."""
    root = Path(__file__).resolve().parent.parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        changes = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=root, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip()[:12] + ("+changes" if changes.stdout.strip() else "")


def program() -> dict[str, Any]:
    """The commit and the versions, for the record of what is made; ask at the start, before somebody edits a file."""
    return {"commit": commit(), "versions": versions()}


def _processor() -> str:
    """The processor's name, or its architecture if the name is unknown."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()


def machine() -> dict[str, Any]:
    """Processor, cores, threads, GPU and system."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(terse=True),
    }


def _counts(images: Source) -> list[int]:
    """How many samples each class has."""
    return np.bincount(images.labels, minlength=len(images.classes)).tolist()


def data_changes(run_json: Path, images: Source) -> str:
    """How many samples were added and how many are gone since `run_facts` counted them, for a message."""
    try:
        facts = parse_json(run_json.read_bytes())
        if "images_of_class" in facts:
            before = {str(c): int(n) for c, n in zip(facts["classes"], facts["images_of_class"], strict=True)}
            now = dict(zip(images.classes, _counts(images), strict=True))
        else:  # the first versions counted no classes
            before, now = {"all classes": int(facts["images"])}, {"all classes": len(images)}
    except (OSError, ValueError, KeyError, TypeError):
        return "other samples than this run began with"
    more = {name: now.get(name, 0) - before.get(name, 0) for name in {**before, **now}}
    changes = [
        f"{sum(counts.values())} {what} ({', '.join(f'{count} of {name}' for name, count in list(counts.items())[:3])})"
        for what, counts in (
            ("added", {name: n for name, n in more.items() if n > 0}),
            ("gone", {name: -n for name, n in more.items() if n < 0}),
        )
        if counts
    ]
    return f"{' and '.join(changes)}, {len(images)} now" if changes else "as many samples as before, but others"


def run_facts(
    config: Config,
    images: Source,
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]],
    psi: Mapping[str, Any],
    judge: Mapping[str, Any],
    world_size: int,
    shown: Sequence[int],
) -> dict[str, Any]:
    """The content of run.json; `shown` are the classes in the columns of the sample grids."""
    return {
        **program(),
        "machine": machine(),
        "world_size": world_size,
        "command": " ".join(["python", *sys.argv]),
        "classes": list(images.classes),
        "empty_classes": sorted(set(range(len(images.classes))) - set(images.filled)),  # nothing is drawn of them
        "images": len(images),
        "images_of_class": _counts(images),
        "sample_grid": {"columns": len(shown), "labels": list(shown) * config.sampling.rows},
        "structure_encoder": dict(psi) or None,
        "judge": dict(judge) or None,
        "parameters": {player: sum(math.prod(s) for s in there.values()) for player, there in shapes.items()},
        "mode": config.game.mode,
    }
