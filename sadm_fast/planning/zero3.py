"""What ZeRO stage 3 gathers: DeepSpeed's rules for keeping a parameter whole between its uses, in closed form.

A parameter of at most `stage3_param_persistence_threshold` elements is persistent: whole all the time, gathered anew
once after each step. Any other is gathered when a pass needs it. After a layer's forward it stays whole if the backward
comes back to it within `stage3_max_reuse_distance` elements, which are counted through the forward's rest and back, or
if prefetching (`stage3_prefetch_bucket_size`) has looked that far ahead; after its backward it goes.

DeepSpeed (0.19.8) remembers what it may keep after a forward from the first pass of the run: if that had no backward,
nothing is kept between forward and backward for the rest of the run.
"""

import math

from sadm_fast.config import ZeroConfig
from sadm_fast.planning.players import Player


def persistent(player: Player, zero: ZeroConfig) -> int:
    """Elements that are whole on every rank all the time."""
    return sum(size for size in player.parameters if size <= zero.stage3_param_persistence_threshold)


def kept(player: Player, zero: ZeroConfig) -> int:
    """Elements, besides the persistent ones, that stay whole from a layer's forward to its backward."""
    if player.traced == "forward":
        return 0
    within_reach = max(zero.stage3_max_reuse_distance // 2, zero.stage3_prefetch_bucket_size)
    return min(player.everything - persistent(player, zero), within_reach)


def partitioned(player: Player, world_size: int) -> int:
    """Elements of one rank's share: each parameter is divided for itself, and padded."""
    return sum(math.ceil(size / world_size) for size in player.parameters)


def most_gathered(player: Player, zero: ZeroConfig) -> int:
    """Elements, besides the persistent ones, that are whole at once: kept, prefetched and in use."""
    others = [size for size in player.parameters if size > zero.stage3_param_persistence_threshold]
    in_use = max(others, default=0)
    return min(sum(others), kept(player, zero) + zero.stage3_prefetch_bucket_size + in_use)


def gathered(player: Player, zero: ZeroConfig) -> int:
    """Elements gathered in one iteration, each as often as it is gathered."""
    always = persistent(player, zero)
    others = player.everything - always
    dropped = others - kept(player, zero)
    total, whole = always, False
    for way in player.passes:
        total += dropped if whole else others
        whole = True
        if way == "train":
            total += dropped
            whole = False
    return total
