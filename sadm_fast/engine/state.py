"""What an engine has learned, in pieces of named parameters that any number of ranks at any ZeRO stage can take up.

Each rank owns some pieces of the fp32 masters (sadm_fast.masters) and of AdamW's two moments; where a piece belongs is
said by its parameter's name and its offset in it. Nothing else of DeepSpeed's state matters between two steps: the
low-precision weights are the masters rounded, and counters and learning rates come from the step number.
"""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import Tensor

from sadm_fast.engine.masters import local_masters, refresh_weights, refresh_whole_copies

MASTER, BUFFER = "master", "buffer"
MOMENTS = ("exp_avg", "exp_avg_sq")


def pieces(engine: Any) -> dict[str, Tensor]:
    """This rank's pieces, by key: views of the optimizer's memory, float32 [n]; buffers as they are, on rank 0 only.

    Call between steps. Before the first step there are no moments yet. Without ZeRO every rank owns everything, and
    rank 0 speaks for all.
    """
    found: dict[str, Tensor] = {}
    if engine.zero_optimization_stage() == 0 and engine.global_rank != 0:
        return found
    owners = _Owners(engine)
    for name, start, value in local_masters(engine):
        found[key(MASTER, start, name)] = value
        for moment, piece in owners.moments(value).items():
            found[key(moment, start, name)] = piece
    if engine.global_rank == 0:
        found |= {key(BUFFER, 0, name): buffer for name, buffer in engine.module.named_buffers() if buffer.numel()}
    return found


def steps_taken(engine: Any) -> int:
    """Optimizer steps that were applied: AdamW's bias correction counts them."""
    return _Owners(engine).steps_taken()


@torch.no_grad()
def restore(engine: Any, saved: "SavedPieces", steps: int) -> None:
    """Bring an engine, fresh or used, to the saved state after `steps` applied steps. Collective.

    Raises:
        KeyError: a piece that this engine needs was not saved.
    """
    owners = _Owners(engine)
    owners.allocate_moments(steps)
    for name, start, value in local_masters(engine):
        value.copy_(saved.read(MASTER, name, start, value.numel()))
        for moment, piece in owners.moments(value).items():
            piece.copy_(saved.read(moment, name, start, value.numel()))
    refresh_weights(engine, lambda name, size: saved.read(MASTER, name, 0, size))
    for name, buffer in engine.module.named_buffers():
        if buffer.numel():
            buffer.copy_(saved.read(BUFFER, name, 0, buffer.numel()).view(buffer.shape))


def key(kind: str, start: int, name: str) -> str:
    """A piece's name in a file: what it is, where it begins in the flattened parameter, and the parameter."""
    return f"{kind}/{start}/{name}"


class _Owners:
    """The tensors that the optimizer itself works on, of which fragments are parts, and their state."""

    def __init__(self, engine: Any) -> None:
        optimizer = engine.optimizer
        self._inner = getattr(optimizer, "optimizer", optimizer)
        if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # stage 3 hands them to the optimizer at each step only
            self._tensors = list(optimizer.fp32_partitioned_groups_flat)
        else:
            self._tensors = [p for group in self._inner.param_groups for p in group["params"]]
        self._by_storage = {tensor.untyped_storage().data_ptr(): tensor for tensor in self._tensors}

    def moments(self, fragment: Tensor) -> dict[str, Tensor]:
        """The moments beside a fragment of the masters: views, none before the first step."""
        owner = self._by_storage[fragment.untyped_storage().data_ptr()]
        state = self._inner.state.get(owner, {})
        first = fragment.storage_offset() - owner.storage_offset()
        return {name: state[name].view(-1)[first : first + fragment.numel()] for name in MOMENTS if name in state}

    def steps_taken(self) -> int:
        counts = {int(self._inner.state[owner]["step"]) for owner in self._tensors if "step" in self._state(owner)}
        counts |= {int(group["step"]) for group in self._inner.param_groups if "step" in group}  # where apex counts
        if len(counts) > 1:
            raise RuntimeError(f"the optimizer's parameters have taken different numbers of steps: {sorted(counts)}")
        return counts.pop() if counts else 0

    def _state(self, owner: Tensor) -> Mapping[str, Any]:
        return self._inner.state.get(owner, {})

    def all_tensors(self, engine: Any) -> list[Tensor]:
        """Everything a step writes to, but for counters and stage 3's whole copies."""
        states = [self._state(owner) for owner in self._tensors]
        moments = [state[name] for state in states for name in MOMENTS if name in state]
        weights = [getattr(p, "ds_tensor", p) for p in engine.module.parameters() if p.requires_grad]
        masters = [owner for owner in self._tensors if not any(owner is p for p in weights)]
        return [*weights, *masters, *moments, *(b for b in engine.module.buffers() if b.numel())]

    def set_steps_taken(self, steps: int) -> None:
        """Put the optimizer's counters back; before the first step it has none, nor moments."""
        if steps == 0:
            self._inner.state.clear()
        for owner in self._tensors:
            if "step" in self._state(owner):
                self._inner.state[owner]["step"].fill_(float(steps))
        for group in self._inner.param_groups:
            if "step" in group:
                group["step"] = steps

    def allocate_moments(self, steps: int) -> None:
        """As after `steps` steps, with moments of zero; for 0 as never used."""
        self._inner.state.clear()
        if steps == 0:
            return
        for owner in self._tensors:
            self._inner.state[owner] = {
                "step": torch.tensor(float(steps), device=owner.device),  # where the fused AdamW wants it
                **{name: torch.zeros_like(owner, memory_format=torch.preserve_format) for name in MOMENTS},
            }
        for group in self._inner.param_groups:
            if "step" in group:
                group["step"] = steps


class Snapshot:
    """One engine as it was at `take`, in memory, so that steps after it can be taken back to the last bit.

    Costs this rank's share of masters and moments and one set of weights.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._owners = _Owners(engine)
        self._kept: list[tuple[Tensor, Tensor]] = []  # (the engine's tensor, its copy)
        self._steps = 0

    @torch.no_grad()
    def take(self) -> None:
        """Remember the engine's state; call between steps."""
        tensors = self._owners.all_tensors(self._engine)
        self._steps = self._owners.steps_taken()
        if len(tensors) != len(self._kept) or any(a is not b for a, (b, _) in zip(tensors, self._kept, strict=True)):
            self._kept = [(tensor, torch.empty_like(tensor)) for tensor in tensors]
        for tensor, copy in self._kept:
            copy.copy_(tensor, non_blocking=True)

    @torch.no_grad()
    def restore(self) -> None:
        """Bring the engine back to what was taken. Collective."""
        for tensor, copy in self._kept:
            tensor.copy_(copy, non_blocking=True)
        self._owners.set_steps_taken(self._steps)
        refresh_whole_copies(self._engine)


class SavedPieces:
    """Pieces in safetensors files, whoever wrote them, read as ranges of parameters; use as a context manager."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._files = list(files)
        self._open = ExitStack()
        self._places: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}

    def __enter__(self) -> Self:
        for path in self._files:
            file = self._open.enter_context(safe_open(path, framework="pt"))
            names: list[str] = list(file.keys())  # the file itself is no mapping
            for name in names:
                kind, start, parameter = name.split("/", 2)
                size = 1
                for dimension in file.get_slice(name).get_shape():
                    size *= dimension
                self._places.setdefault((kind, parameter), []).append((int(start), size, file, name))
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def read(self, kind: str, name: str, start: int, count: int) -> Tensor:
        """Elements start .. start + count of a flattened parameter: a tensor [count] of its own.

        Raises:
            KeyError: some of them were not saved.
        """
        result: Tensor | None = None
        covered = 0
        for first, size, file, stored in self._places.get((kind, name), ()):
            low, high = max(first, start), min(first + size, start + count)
            if low >= high:
                continue
            piece = file.get_slice(stored)
            piece = piece[low - first : high - first] if len(piece.get_shape()) == 1 else piece[:].flatten()
            if len(piece) == count:
                return piece
            if result is None:
                result = torch.empty(count, dtype=piece.dtype)
            result[low - start : high - start] = piece
            covered += high - low
        if result is None or covered != count:
            raise KeyError(f"{kind} of {name}: {covered} of {count} values from {start} on are there")
        return result
