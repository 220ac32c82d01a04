"""Files of weights as {name: tensor}: safetensors, PyTorch's .pt, folders of runs and of diffusers. No file is run.

Tensors are mapped from the file where its format allows it: names and shapes cost nothing, and values are read when
they are used.
"""

import argparse
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from sadm_fast.errors import UserError
from sadm_fast.exchange.diffusers import TRANSFORMER, WEIGHTS, from_diffusers, is_diffusers, transformer_folder
from sadm_fast.files import expand_home, parse_json
from sadm_fast.models.dit import without_gammas
from sadm_fast.run.checkpoint import sha256
from sadm_fast.run.folder import RunFolder
from sadm_fast.run.manifest import EMA_FILE, completed

# What a safetensors file of DiffFit's trained parameters says in its header of the weights that it belongs to.
STARTING = ("starting_weights", "starting_weights_entry", "starting_weights_sha256")

_LFS = b"version https://git-lfs.github.com/spec/"
_SAFETENSORS_HEADER = 8  # bytes before the brace that opens its JSON
_COUNTERS = "num_batches_tracked"  # of batch norms: whole numbers, without a say in what a network computes


def find_weights(key: str, path: str | Path) -> Path:
    """The file that `path` means: itself, or in a folder the average of a run or checkpoint, or a DiT of diffusers.

    Raises:
        UserError: in the name of `key` (a field or an option), if there is none.
    """
    found = Path(expand_home(path))
    if found.is_dir():
        if (transformer := transformer_folder(found)) is not None:
            there = [transformer / name for name in WEIGHTS if (transformer / name).is_file()]
            if not there:
                raise UserError(f"{key}={path}: has no {TRANSFORMER} weights in one file ({' or '.join(WEIGHTS)})")
            return there[0]
        checkpoints = completed(RunFolder(found).checkpoints)
        folder = checkpoints[-1] if checkpoints else found
        if not (folder / EMA_FILE).is_file():
            raise UserError(
                f"{key}={path}: is a folder without weights (a run's, a checkpoint's, or a DiT's of diffusers)"
            )
        return folder / EMA_FILE
    if not found.exists():
        raise UserError(f"{key}={path}: there is no such file")
    return found


def read_weights(key: str, path: str | Path, entry: str = "ema") -> dict[str, Tensor]:
    """Read a file of weights (`find_weights`): tensors on the CPU by name, floating point, of any shapes.

    A DiT of diffusers gets DiT's names. What DiffFit has trained is put on the weights that it started from, which must
    be where its file says or beside it; scale factors are multiplied into their layers.

    entry: of a training program's .pt, {"model": ..., "ema": ..., "opt": ...} as DiT's and SiT's train.py write it.

    Raises:
        UserError: in one line, in the name of `key`: it cannot be read, is cut off, would run code, or holds something
            else than tensors of floating-point numbers.
    """
    file = find_weights(key, path)
    try:
        with file.open("rb") as opened:
            start = opened.read(64)
        if start.startswith(_LFS):
            raise ValueError('it is a pointer of Git LFS; fetch the file itself with "git lfs pull"')
        safetensors = start[_SAFETENSORS_HEADER : _SAFETENSORS_HEADER + 1] == b"{"
        content = load_file(file) if safetensors else _load_torch(file)
        state = _state(content, entry)
        if is_diffusers(state):
            state = from_diffusers(state, file.parent)
        if safetensors and (base := _starting_weights(file)) is not None:
            state = without_gammas(read_weights(key, *base) | state)
    except (OSError, SafetensorError, ValueError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:200]
        raise UserError(f"{key}={path}: cannot be read as weights ({reason})") from None
    return state


def _starting_weights(file: Path) -> tuple[Path, str] | None:
    """The weights and entry that a file of DiffFit's trained parameters belongs to; None if it is no such file.

    Raises:
        ValueError: they are not there, or are others.
    """
    with safe_open(file, framework="pt") as opened:
        said = opened.metadata() or {}
    if not said.keys() >= set(STARTING):
        return None
    path, entry, digest = (said[name] for name in STARTING)
    for place in (Path(expand_home(path)), file.parent / Path(path).name):
        if place.exists():
            if sha256(find_weights(STARTING[0], place)) != digest:
                raise ValueError(f"DiffFit trained it on other weights than {place} holds now; sha256 {digest}")
            return place, entry
    raise ValueError(f"DiffFit trained it on {path}, which is not there; put it there or beside the file")


def class_names(path: str | Path) -> list[str] | None:
    """The names of the classes of weights, by number, where a run's folder or a diffusers pipeline's says them."""
    folder = Path(expand_home(path))
    try:
        run = folder.parent.parent if folder.parent.name == "checkpoints" else folder
        if RunFolder(run).facts.is_file():
            return [str(name) for name in parse_json(RunFolder(run).facts.read_bytes())["classes"]]
        names = parse_json((folder / "model_index.json").read_bytes())["id2label"]
        return [str(names[str(label)]) for label in range(len(names))]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def require_finite(key: str, path: str | Path, state: Mapping[str, Tensor]) -> None:
    """UserError if a value is NaN or infinite. It reads the whole file."""
    for name, value in state.items():
        if not torch.isfinite(value).all():
            raise UserError(f"{key}={path}: {name} holds values that are not finite; the file is damaged")


def misfit(there: Mapping[str, tuple[int, ...]], own: Mapping[str, tuple[int, ...]]) -> str | None:
    """Say in which names or shapes two states differ; None if in none."""
    for what, names in (("lacks", own.keys() - there.keys()), ("has the unknown", there.keys() - own.keys())):
        if names:
            return f"it {what} {min(names)}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
    for name, shape in own.items():
        if there[name] != shape:
            return f"its {name} is {list(there[name])}, here it is {list(shape)}"
    return None


def shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shapes of a state's tensors."""
    return {name: tuple(value.shape) for name, value in state.items()}


def _load_torch(file: Path) -> Any:
    """What torch.save wrote; ValueError with a clause that says what is wrong."""
    zipped = zipfile.is_zipfile(file)  # since PyTorch 1.6; only these can be mapped
    try:
        # A train.py keeps its arguments beside the weights: a Namespace, which is plain data.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings(action="ignore"):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a damaged pickle raises nearly anything
        refused = re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if refused:
            raise ValueError(f"reading it would run {refused[1]}; only tensors are read") from None
        raise ValueError("it is neither safetensors nor what torch.save writes, or it is cut off") from None


def _state(content: Any, entry: str) -> dict[str, Tensor]:
    """The tensors of a file's content by name; ValueError if there are none, or others than floating point."""
    if isinstance(content, Mapping) and "ema" in content and isinstance(content["ema"], Mapping):
        if not isinstance(content.get(entry), Mapping):
            raise ValueError(f"it has no {entry}, only {', '.join(map(str, content))}")
        content = content[entry]
    if not isinstance(content, Mapping):
        raise ValueError(f"it holds a {type(content).__name__}, not tensors by name")
    state: dict[str, Tensor] = {}
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"its {name} is a {type(value).__name__}, not a tensor")
        if name.rpartition(".")[2] == _COUNTERS:
            continue
        if not value.is_floating_point():
            raise ValueError(f"{name} holds {str(value.dtype).removeprefix('torch.')}, not floating-point numbers")
        state[name] = value
    return state
