"""Errors of a configuration, in one line each."""

import difflib
import json
from collections.abc import Sequence
from typing import Any, get_args

from pydantic import BaseModel

from sadm_fast.errors import UserError

# Keys at the top of DeepSpeed's own configuration files, none of them a key of ours.
_OF_DEEPSPEED = frozenset({
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "steps_per_print",
    "optimizer", "scheduler", "zero_optimization", "zero_allow_untested_optimizer", "gradient_clipping",
    "prescale_gradients", "fp16", "bf16", "amp", "wall_clock_breakdown", "activation_checkpointing", "flops_profiler",
    "communication_data_type",
})  # fmt: skip


_LONGEST = 80  # characters of a value or key in a message


def refuse_deepspeed_format(path: object, raw: dict[str, Any]) -> None:
    """UserError if `raw` (the content of the file `path`) is DeepSpeed's configuration instead of this program's."""
    found = [key for key in raw if key in _OF_DEEPSPEED]
    if found and "name" not in raw:
        raise UserError(
            f"--config {path}: is in DeepSpeed's format ({', '.join(found[:3])}); expected is a file as in configs/,"
            " for example configs/mnist.json: DeepSpeed's settings are derived from it, and its"
            " deepspeed.zero_optimization block is passed on"
        )


def _blocks(annotation: Any) -> list[type[BaseModel]]:
    """List the blocks that a field's type may hold: one, the members of a union, or none."""
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [block for member in get_args(annotation) for block in _blocks(member)]


def _known_keys(location: Sequence[str], root: type[BaseModel]) -> list[str]:
    """List the keys allowed beside the last one of a pydantic location, which names the chosen member of a union."""
    blocks: list[type[BaseModel]] = [root]
    for part in location[:-1]:
        fields = blocks[0].model_fields
        if part in fields and len(blocks) == 1:
            blocks = _blocks(fields[part].annotation)
        else:
            blocks = [b for b in blocks if any(part in get_args(f.annotation) for f in b.model_fields.values())]
        if not blocks:
            return []
    return sorted(field.alias or name for name, field in blocks[0].model_fields.items())


def explain(problem: Any, root: type[BaseModel]) -> str:
    """Say one of pydantic's errors in one line: the key's path, its value, what is allowed."""
    tags = {"edm", "vp", "flow", "power", "exponential"}  # pydantic names the member of a union in the path
    location = [str(part) for part in problem["loc"]]
    path = ".".join(_printable(part) for part in location if part not in tags)
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        known = _known_keys(location, root)
        near = difflib.get_close_matches(location[-1], known, 1)
        return f"{path}: unknown key; " + (f"did you mean {near[0]}?" if near else f"allowed: {', '.join(known)}")
    if kind == "missing":
        return f"{path}: is missing"
    if kind.startswith("union_tag"):
        key = f"{path}.{context['discriminator'].strip(chr(39))}"
        if kind == "union_tag_not_found":
            return f"{key}: is missing"
        return f"{key}={_shown(context['tag'])}: must be one of {context['expected_tags']}"
    message = problem["msg"].removeprefix("Value error, ")
    if kind == "value_error":  # our own: they start with the key, relative to their block
        return f"{path}.{message}" if path else message
    return f"{path}={_shown(problem['input'])}: {message[0].lower()}{message[1:]}"


def _shown(value: Any) -> str:
    """A value as JSON, cut where it is long: a key may hold anything."""
    text = json.dumps(value, default=str)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _printable(key: str) -> str:
    """A key as it stands, cut where it is long and escaped where it would break the line."""
    key = key[:_LONGEST]
    return key if key.isprintable() else json.dumps(key)[1:-1]
