"""Elements that ZeRO stage 3 gathers in one iteration: DeepSpeed's (0.19.8) rules, simulated on sizes.

- A parameter of at most `stage3_param_persistence_threshold` elements is persistent: whole all the time, and gathered
  once after each step.
- Any other is gathered when a module needs it, or earlier by prefetching. Each module prefetches up to
  `stage3_prefetch_bucket_size` elements, as long as no more than `stage3_max_live_parameters` are whole.
- It is released when its module is done. Exceptions: a module needs it again within `stage3_max_reuse_distance`
  elements, or prefetching passed its next use while it was there.
- DeepSpeed learns in the first pass of the run what a forward may release. If that pass had no backward, every forward
  of the run releases everything.
"""

from collections import deque
from functools import lru_cache
from typing import NamedTuple

from sadm_fast.config_training import ZeroConfig
from sadm_fast.planning.players import Node, Player


class Gathered(NamedTuple):
    """Elements of a player's parameters."""

    in_all: int  # gathered in one iteration; a parameter counts as often as it is gathered
    at_once: int  # whole at the same time, at most; persistent ones not counted


def persistent(player: Player, zero: ZeroConfig) -> int:
    """Count the elements that are whole on every rank all the time."""
    return sum(size for size in player.parameters if size <= zero.stage3_param_persistence_threshold)


def partitioned(player: Player, world_size: int) -> int:
    """Count the elements of one rank's share: each parameter is divided by itself, and padded."""
    return sum(-(-size // world_size) for size in player.parameters)


@lru_cache
def gathered(player: Player, zero: ZeroConfig) -> Gathered:
    """Simulate one iteration after the run has settled, which it has by the third."""
    coordinator = _Coordinator(player, zero)
    for way in player.passes:
        coordinator.reset()
        coordinator.forward(player.tree)
        if way == "train":
            coordinator.backward(player.tree)
    again = player.steps * persistent(player, zero)
    return Gathered(coordinator.in_all + again, coordinator.at_once)


class _Coordinator:
    """The decisions of DeepSpeed's PartitionedParameterCoordinator; a parameter is its index."""

    def __init__(self, player: Player, zero: ZeroConfig) -> None:
        self._sizes, self._zero = player.parameters, zero
        self._forgets = player.traced == "forward"
        self._persistent = {i for i, size in enumerate(self._sizes) if size <= zero.stage3_param_persistence_threshold}
        self._trace = [*_forward_order(player.tree), *_backward_order(player.tree)]
        self._whole: set[int] = set()
        self._ahead: set[int] = set()  # prefetched, not used yet
        self.in_all = self.at_once = 0
        self.reset()

    def reset(self) -> None:
        """Start a pass: release what was prefetched and not used."""
        self._ahead.clear()
        self._queue = deque((i, step) for step, own in enumerate(self._trace) for i in sorted(own))
        self._fetched_for: dict[int, int] = {}
        self._step = self._live = 0

    def forward(self, node: Node) -> None:
        self._fetch(node.own)
        for child in node.children:
            self.forward(child)
        self._release(node.own, forget=self._forgets)

    def backward(self, node: Node) -> None:
        self._fetch(node.own)
        if node.recomputed:
            for child in node.children:
                self.forward(child)
        for child in reversed(node.children):
            self.backward(child)
        self._release(node.own, forget=False)

    def _available(self, i: int) -> bool:
        return i in self._whole or i in self._ahead or i in self._persistent

    def _gather(self, i: int) -> None:
        self.in_all += self._sizes[i]
        self._live += self._sizes[i]

    def _fetch(self, own: tuple[int, ...]) -> None:
        for i in own:
            if not self._available(i):
                self._gather(i)
        self._ahead.difference_update(own)
        self._whole.update(set(own) - self._persistent)
        for _ in {i for i in own if self._fetched_for.get(i, -1) < self._step}:
            if self._queue:
                i, step = self._queue.popleft()
                self._fetched_for[i] = step
        room = min(self._zero.stage3_max_live_parameters - self._live, self._zero.stage3_prefetch_bucket_size)
        fetching = 0
        while self._queue and fetching < room:
            i, step = self._queue.popleft()
            self._fetched_for[i] = max(self._fetched_for.get(i, -1), step)
            if not self._available(i):
                self._gather(i)
                self._ahead.add(i)
                fetching += self._sizes[i]
        self.at_once = max(self.at_once, sum(self._sizes[i] for i in self._whole | self._ahead))
        self._step += 1

    def _release(self, own: tuple[int, ...], forget: bool) -> None:
        released = {i for i in own if i in self._whole}
        if not forget:
            released = {i for i in released if self._fetched_for.get(i, -1) <= self._step}
            passed = 0
            for later in self._trace[self._step :]:
                if not released or passed >= self._zero.stage3_max_reuse_distance:
                    break
                released.difference_update(later)
                passed += sum(self._sizes[i] for i in later)
        self._whole -= released
        self._live -= sum(self._sizes[i] for i in released)


def _forward_order(node: Node) -> list[tuple[int, ...]]:
    """List each module's own parameters, in the order in which a forward pass enters the modules."""
    return [node.own, *(own for child in node.children for own in _forward_order(child))]


def _backward_order(node: Node) -> list[tuple[int, ...]]:
    again = [own for child in node.children for own in _forward_order(child)] if node.recomputed else []
    return [node.own, *again, *(own for child in reversed(node.children) for own in _backward_order(child))]
