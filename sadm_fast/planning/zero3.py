"""What ZeRO stage 3 gathers in one iteration: DeepSpeed's (0.19.8) rules, played through on sizes.

A parameter of at most `stage3_param_persistence_threshold` elements is persistent: whole all the time, gathered anew
once after each step. Any other is gathered when a module needs it, or before, when prefetching reaches it: at each
module up to `stage3_prefetch_bucket_size` elements more, as long as no more than `stage3_max_live_parameters` are
whole. It is given up when its module is done, unless a module needs it again within `stage3_max_reuse_distance`
elements, or prefetching has already passed over its next use because it was there.

What may be given up after a forward DeepSpeed remembers from the first pass of the run. If that had no backward,
everything is given up after every forward for the rest of the run.
"""

from collections import deque
from functools import lru_cache
from typing import NamedTuple

from sadm_fast.config import ZeroConfig
from sadm_fast.planning.players import Node, Player


class Gathered(NamedTuple):
    """Elements of a player's parameters."""

    in_all: int  # gathered in one iteration, each as often as it is gathered
    at_once: int  # most that are whole at one time, the persistent ones left out


def persistent(player: Player, zero: ZeroConfig) -> int:
    """Elements that are whole on every rank all the time."""
    return sum(size for size in player.parameters if size <= zero.stage3_param_persistence_threshold)


def partitioned(player: Player, world_size: int) -> int:
    """Elements of one rank's share: each parameter is divided for itself, and padded."""
    return sum(-(-size // world_size) for size in player.parameters)


@lru_cache
def gathered(player: Player, zero: ZeroConfig) -> Gathered:
    """One iteration of a run that has settled: from its third on."""
    coordinator = _Coordinator(player, zero)
    for way in player.passes:
        coordinator.reset()
        coordinator.forward(player.tree)
        if way == "train":
            coordinator.backward(player.tree)
    again = player.steps * persistent(player, zero)
    return Gathered(coordinator.in_all + again, coordinator.at_once)


class _Coordinator:
    """The part of DeepSpeed's PartitionedParameterCoordinator that decides; parameters are their indices."""

    def __init__(self, player: Player, zero: ZeroConfig) -> None:
        self._sizes, self._zero = player.parameters, zero
        self._forgets = player.traced == "forward"
        self._persistent = {i for i, size in enumerate(self._sizes) if size <= zero.stage3_param_persistence_threshold}
        self._trace = [*_forward_order(player.tree), *_backward_order(player.tree)]
        self._whole: set[int] = set()
        self._ahead: set[int] = set()  # prefetched, and not asked for yet
        self.in_all = self.at_once = 0
        self.reset()

    def reset(self) -> None:
        """Before a pass: what was prefetched for nothing is given up."""
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
        given_up = {i for i in own if i in self._whole}
        if not forget:
            given_up = {i for i in given_up if self._fetched_for.get(i, -1) <= self._step}
            passed = 0
            for later in self._trace[self._step :]:
                if not given_up or passed >= self._zero.stage3_max_reuse_distance:
                    break
                given_up.difference_update(later)
                passed += sum(self._sizes[i] for i in later)
        self._whole -= given_up
        self._live -= sum(self._sizes[i] for i in given_up)


def _forward_order(node: Node) -> list[tuple[int, ...]]:
    """Parameters that each module itself has, in the order in which the modules are entered."""
    return [node.own, *(own for child in node.children for own in _forward_order(child))]


def _backward_order(node: Node) -> list[tuple[int, ...]]:
    again = [own for child in node.children for own in _forward_order(child)] if node.recomputed else []
    return [node.own, *again, *(own for child in reversed(node.children) for own in _backward_order(child))]
