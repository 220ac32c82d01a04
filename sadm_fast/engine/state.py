"""The learned state of an engine in pieces, which any number of ranks at any ZeRO stage can write and take up.

A rank owns pieces of the fp32 masters (engine/masters.py) and of AdamW's two moments; a piece is named by its parameter
and its offset in the flattened parameter. Nothing else in DeepSpeed's state matters between two steps: the
low-precision weights are the masters, rounded, and learning rates follow from the step number.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sadm_fast.engine.flat import network_of
from sadm_fast.engine.masters import local_masters, refresh_weights, refresh_whole_copies
from sadm_kernels.adamw import restore_if_not_finite

MASTER, BUFFER = "master", "buffer"
MOMENTS = ("exp_avg", "exp_avg_sq")


class Piece(NamedTuple):
    """A range of a parameter's master or moment, or a whole buffer."""

    kind: str  # MASTER, one of MOMENTS, or BUFFER
    name: str  # of the parameter or buffer
    start: int  # offset in the flattened parameter
    value: Tensor  # float32 [n], a view of the optimizer's memory; a buffer as it is


class Reader(Protocol):
    """Reads elements start .. start + count of what was saved of a piece, [count]; KeyError if some are absent."""

    def __call__(self, kind: str, name: str, start: int, count: int) -> Tensor: ...


def pieces(engine: Any) -> Iterator[Piece]:
    """The pieces this rank owns; rank 0 has the buffers too. Call between steps.

    There are no moments before the first step. Without ZeRO every rank owns everything, and only rank 0 yields it.
    """
    if engine.zero_optimization_stage() == 0 and engine.global_rank != 0:
        return
    owners = OptimizerState(engine)
    for name, start, value in local_masters(engine):
        yield Piece(MASTER, name, start, value)
        for moment, part in owners.moments(value).items():
            yield Piece(moment, name, start, part)
    if engine.global_rank == 0:
        for name, buffer in network_of(engine.module).named_buffers():
            if buffer.numel():
                yield Piece(BUFFER, name, 0, buffer)


def steps_taken(engine: Any) -> int:
    """The number of optimizer steps applied, which AdamW's bias correction uses."""
    return OptimizerState(engine).steps_taken()


@torch.no_grad()
def restore(engine: Any, read: Reader, steps: int) -> None:
    """Bring an engine, fresh or used, to the saved state after `steps` applied steps. Collective.

    Raises:
        KeyError: a piece that this engine needs was not saved.
    """
    owners = OptimizerState(engine)
    owners.allocate_moments(steps)
    for name, start, value in local_masters(engine):
        value.copy_(read(MASTER, name, start, value.numel()))
        for moment, part in owners.moments(value).items():
            part.copy_(read(moment, name, start, value.numel()))
    refresh_weights(engine, lambda name, size: read(MASTER, name, 0, size))
    for name, buffer in network_of(engine.module).named_buffers():
        if buffer.numel():
            buffer.copy_(read(BUFFER, name, 0, buffer.numel()).view(buffer.shape))


class OptimizerState:
    """The tensors that the optimizer steps, with their state; fragments of the masters are parts of them."""

    def __init__(self, engine: Any) -> None:
        optimizer = engine.optimizer
        self._inner = getattr(optimizer, "optimizer", optimizer)
        if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # stage 3 hands them to the optimizer at each step only
            self._tensors = list(optimizer.fp32_partitioned_groups_flat)
        else:
            self._tensors = [p for group in self._inner.param_groups for p in group["params"]]
        self._by_storage = {tensor.untyped_storage().data_ptr(): tensor for tensor in self._tensors}

    def moments(self, fragment: Tensor) -> dict[str, Tensor]:
        """Views of the moments [n] that belong to a fragment [n] of the masters; none before the first step."""
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

    def moments_of_owners(self) -> tuple[Tensor, ...]:
        """The moments of all tensors that are stepped; none before the first step."""
        states = [self._state(owner) for owner in self._tensors]
        return tuple(state[name] for state in states for name in MOMENTS if name in state)

    def all_tensors(self, engine: Any) -> list[Tensor]:
        """All tensors that a step changes, except counters and stage 3's whole copies of weights."""
        weights = [getattr(p, "ds_tensor", p) for p in engine.module.parameters() if p.requires_grad]
        masters = [owner for owner in self._tensors if not any(owner is p for p in weights)]
        return [*weights, *masters, *self.moments_of_owners(), *(b for b in engine.module.buffers() if b.numel())]

    def set_steps_taken(self, steps: int) -> None:
        """Set the optimizer's step counters."""
        for owner in self._tensors:
            if "step" in self._state(owner):
                self._inner.state[owner]["step"].fill_(float(steps))
        for group in self._inner.param_groups:
            if "step" in group:
                group["step"] = steps

    def allocate_moments(self, steps: int) -> None:
        """Give the optimizer the state of `steps` applied steps, with zero moments."""
        for owner in self._tensors:
            self._inner.state[owner] = {
                name: torch.zeros_like(owner, memory_format=torch.preserve_format) for name in MOMENTS
            }
            if not self._counts_once:
                self._inner.state[owner]["step"] = torch.tensor(float(steps), device=owner.device)  # as AdamW wants it
        self.set_steps_taken(steps)

    def forget(self) -> None:
        """Remove the moments, as before the first step."""
        self._inner.state.clear()
        for group in self._inner.param_groups:
            if "step" in group:
                group["step"] = 0

    def count_once(self) -> None:
        """Count steps for all tensors together, as a number (apex does), instead of on the device for each."""
        for group in self._inner.param_groups:
            group.setdefault("step", 0)

    @property
    def _counts_once(self) -> bool:
        return all("step" in group for group in self._inner.param_groups)


class Snapshot:
    """A copy in memory of an engine's state, to undo later steps bit for bit.

    It takes as much memory as this rank's masters and moments and one set of weights.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._owners = OptimizerState(engine)
        self._kept: list[tuple[Tensor, Tensor]] = []  # (the engine's tensor, its copy)
        self._steps = 0

    @torch.no_grad()
    def take(self) -> None:
        """Copy the engine's state, without waiting for the device; call between steps."""
        tensors = self._owners.all_tensors(self._engine)
        self._steps = self._owners.steps_taken()
        if len(tensors) != len(self._kept) or any(a is not b for a, (b, _) in zip(tensors, self._kept, strict=True)):
            self._kept = [(tensor, torch.empty_like(tensor)) for tensor in tensors]
        torch._foreach_copy_([copy for _, copy in self._kept], tensors, non_blocking=True)

    @torch.no_grad()
    def restore_unless(self, finite: Tensor) -> None:
        """Bring tensors, but no counters, back to the copy if 0-d float32 `finite` is not; does not wait for it."""
        restore_if_not_finite(finite, *zip(*self._kept, strict=True))

    @torch.no_grad()
    def restore(self) -> None:
        """Bring the engine back to the copy. Collective."""
        for tensor, copy in self._kept:
            tensor.copy_(copy, non_blocking=True)
        if self._steps:
            self._owners.set_steps_taken(self._steps)
        else:
            self._owners.forget()
        refresh_whole_copies(self._engine)
