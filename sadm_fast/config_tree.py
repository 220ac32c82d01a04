"""A configuration as nested dictionaries: read strictly from a file, changed by `--set`, compared on resume."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from sadm_fast.errors import UserError
from sadm_fast.files import expand_home

_DEEPEST = 16  # objects and lists inside one another; a configuration needs 4

LEARNING_RATES = ("denoiser_optimizer.lr", "discriminator_optimizer.lr")

# What a resumed run may have different: how long, how often, how parallel, how fast; not what is computed.
CHANGEABLE = (
    "name",
    "train.steps",
    "train.log_every",
    "train.sample_every",
    "train.checkpoint_every",
    "train.keep_last",
    "train.keep_every",
    "train.ema_snapshot_every",
    "train.patience",
    "train.micro_batch",  # as long as all ranks together take as many samples a step, and compare as many
    "train.grad_accumulation",
    *LEARNING_RATES,  # where a run diverges, it goes on from an earlier checkpoint with a lower one
    "deepspeed.zero_optimization",
    "train.compile",  # other roundings, and a way out where compilation fails
    "train.activation_checkpointing",
    "data.path",
    "data.threads",
    "data.prefetch",
    "data.loader",
    "data.decode",
    "data.broken",
    "latents.autoencoder",  # may have moved; that it is the same one is checked by its hash
    "latents.images",
    "latents.images_source",
    "latents.batch",
    "latents.shard_size",
    "sampling",
    "evaluate",
    "logging",
)

# Fields of older versions, with their default: the config.json of a run of that time holds them.
RETIRED = {
    "deepspeed.wall_clock_breakdown": False,
    "deepspeed.zero_optimization.contiguous_gradients": True,
    "deepspeed.zero_optimization.offload_optimizer.nvme_path": None,
    "deepspeed.zero_optimization.offload_param.nvme_path": None,
}


# Fields that a configuration of the first versions does not have, with the default that says what it meant. Where
# they have it they are left out of its fingerprint: runs of that time go on.
LATER: dict[str, Any] = {
    "data.held_out": 0.0,
    "data.shape": None,
    "denoiser.architecture": "dit",
    "denoiser.label_map": None,
    "denoiser.position_grid": None,
    "denoiser.train": "all",
    "denoiser.weights_entry": "ema",
    "diffusion.direction": "noise",
    "game.block": 1,
    "game.compare": "samples",
    "game.decay_steps": 0,
    "game.look_at": "estimate",
    "game.noise_levels": "sample",
    "game.stage": 2,
    "game.stop_step": None,
    "game.strength": "weight",
    "game.warmup_steps": 0,
    "structure_encoder.input": "samples",
    "structure_encoder.depth": 12,
    "structure_encoder.patch_size": 14,
    "structure_encoder.input_size": 224,
    "structure_encoder.position_grid": 37,
    "structure_encoder.pretrain.labels": "own",
    "structure_encoder.registers": 0,
    "train.more_ema": [],
}


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as it stands in the file: a dict would forget a key that is given twice."""


def read_object(path: str | Path) -> dict[str, Any]:
    """Read the JSON object in a file. Text is UTF-8, with or without a byte order mark.

    Raises:
        UserError: the file cannot be read, or is not strict JSON: a key given twice, NaN or Infinity, another encoding.
    """
    try:
        content = Path(expand_home(path)).read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(f"--config {path}: {getattr(error, 'strerror', None) or error}") from None
    if not content.strip():
        raise UserError(f"--config {path}: is empty; it must hold one JSON object, as the files in configs/ do")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"--config {path}: is not valid JSON: not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from None
    try:
        tree = _plain(_loads(text), ())
    except ValueError as error:
        raise UserError(f"--config {path}: not valid JSON ({error})") from None
    if not isinstance(tree, dict):
        kind = {list: "a list", str: "a text", type(None): "null"}.get(type(tree), "a number or truth value")
        raise UserError(f"--config {path}: must hold one JSON object, not {kind}")
    return tree


def override(raw: dict[str, Any], text: str) -> None:
    """Set one key of `raw` as `--set` says: `key.path=value`, the value in JSON or a bare string.

    Raises:
        UserError: it has another form, or its path leads through something that is no block.
    """
    path, equals, value_text = text.partition("=")
    if not equals or not path:
        raise UserError(f"--set {text}: must be key.path=value, for example --set train.steps=100")
    try:
        loaded = _loads(value_text)
    except ValueError:
        loaded = value_text
    *parents, last = path.split(".")
    try:
        value = _plain(loaded, (*parents, last))
    except ValueError as error:
        raise UserError(f"--set {text[:200]}: {error}") from None
    if len(parents) > _DEEPEST:
        raise UserError(f"--set {text[:200]}: no key is so deep")
    node = raw
    for key in parents:
        node = node.setdefault(key, {})
        if not isinstance(node, dict):
            raise UserError(f"--set {text}: {key} is not a block of the configuration")
    node[last] = value


def without_retired(raw: Mapping[str, Any], retired: Mapping[str, Any] = RETIRED) -> dict[str, Any]:
    """Copy `raw` without fields of older versions (dotted paths) at their default.

    With another value they stay, and are unknown keys.
    """
    result = dict(raw)
    for path, value in retired.items():
        first, _, rest = path.partition(".")
        inner = result.get(first)
        if rest and isinstance(inner, Mapping):
            result[first] = without_retired(inner, {rest: value})
        elif not rest and first in result and inner is value:
            del result[first]
    return result


def without_later(tree: dict[str, Any]) -> dict[str, Any]:
    """Copy a resolved configuration without the fields of LATER that have their default."""
    known = flatten(tree)
    return without(tree, (path for path, value in LATER.items() if path in known and known[path] == value))


def without(tree: dict[str, Any], paths: Iterable[str]) -> dict[str, Any]:
    """Copy nested dictionaries without the dotted `paths`; KeyError if one is not there."""
    result = {k: without(v, ()) if isinstance(v, dict) else v for k, v in tree.items()}
    for path in paths:
        *parents, last = path.split(".")
        node: Any = result
        for key in parents:
            node = node[key]
        if node is not None:  # a block that is not there
            node.pop(last)
    return result


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested dictionaries into {"a.b.c": value}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _loads(text: str) -> Any:
    """Parse strict JSON, objects as _Pairs; ValueError says in one line what is wrong."""
    try:
        return json.loads(text, object_pairs_hook=_Pairs, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a number in JSON")


def _plain(value: Any, path: tuple[str, ...]) -> Any:
    """Turn _Pairs into dictionaries; ValueError with the path of a key given twice."""
    if len(path) > _DEEPEST:
        raise ValueError("nested too deeply")
    if isinstance(value, _Pairs):
        found: dict[str, Any] = {}
        for key, inner in value:
            if key in found:
                raise ValueError(f"{'.'.join((*path, key))}: given twice")
            found[key] = _plain(inner, (*path, key))
        return found
    if isinstance(value, list):
        return [_plain(inner, (*path, str(i))) for i, inner in enumerate(value)]
    return value
