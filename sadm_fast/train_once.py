"""Train a module once and keep it in a file: safetensors, with what is known about it as JSON in the header."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sadm_fast.errors import UserError
from sadm_fast.files import replacing, require_writable
from sadm_fast.ranks.collectives import broadcast_json, broadcast_state, is_rank_zero

_FORMAT = "sadm_fast.pretrain/1"


def load_or_train(
    path: Path, build: Callable[[], nn.Module], train: Callable[[nn.Module], dict[str, Any]], fingerprint: str
) -> tuple[nn.Module, dict[str, Any]]:
    """Return the module of `build` with the weights kept at `path`, or trained by `train` and then kept there.

    Collective: every rank calls this (and `train`, if nothing is kept); rank 0 alone reads and writes, and all ranks
    get its weights and its dictionary.

    Args:
        train: changes the module in place and returns what is to be known about it, for example {"accuracy": 0.98};
            JSON values only.
        fingerprint: names everything the weights depend on (architecture, data, seed, steps). A file with another one
            is replaced, like one that is damaged.
    Returns:
        The module in eval mode, and the dictionary plus "cached": True or False.
    Raises:
        UserError: on all ranks and before any training, `path` holds a file of other origin or cannot be written.
    """
    found, problem = None, None
    if is_rank_zero():
        try:
            found = _read(path, fingerprint)
            if found is None:
                require_writable(path, "pretrained weights", make_folder=True)
        except UserError as error:
            problem = str(error)
    hit, info = _agreed([found is not None, found[1] if found else {}], problem)
    module = build()
    if hit:
        if found is not None:
            module.load_state_dict(found[0], strict=True)
    else:
        info, problem = train(module), None
        if is_rank_zero():
            try:
                _write(path, module, info, fingerprint)
            except (OSError, SafetensorError) as error:
                problem = f"{path}: cannot be written ({error}); free some space or choose another folder"
        info = _agreed(info, problem)
    broadcast_state((module,))
    return module.eval(), {**info, "cached": hit}


def require_own(path: Path) -> None:
    """Check that a file at `path`, if there is one, is of `load_or_train`; only its header is read.

    Raises:
        UserError: it is another program's, or cannot be opened.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (FileNotFoundError, SafetensorError):
        return  # a damaged one is trained again
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error}); move it away or fix its permissions") from error
    if metadata.get("format") != _FORMAT:
        raise UserError(f"{path}: exists but was not written by this program; move it away")


def _agreed(value: Any, problem: str | None) -> Any:
    """Rank 0's JSON value on every rank; a UserError on every rank if rank 0 has a problem. Collective."""
    value, problem = broadcast_json([value, problem])
    if problem is not None:
        raise UserError(problem)
    return value


def _digest(state: dict[str, Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of the tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path, fingerprint: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Weights and dictionary of a sound file with this fingerprint, else None; UserError as `require_own`."""
    require_own(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        info = json.loads(metadata["info"])
        sound = metadata["sha256"] == _digest(state)
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError):
        return None
    return (state, info) if sound and metadata.get("fingerprint") == fingerprint else None


def _write(path: Path, module: nn.Module, info: dict[str, Any], fingerprint: str) -> None:
    """Write weights and dictionary as one file that appears whole or not at all."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    metadata = {"format": _FORMAT, "fingerprint": fingerprint, "info": json.dumps(info), "sha256": _digest(state)}
    with replacing(path) as temporary:
        save_file(state, temporary, metadata)
