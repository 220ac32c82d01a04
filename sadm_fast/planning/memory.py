"""Memory of one rank: the bytes held all the time, and the bytes that each moment of an iteration adds.

Counted: the tensors of the trainer and of DeepSpeed (0.19.8). Not counted: what libraries take for themselves (CUDA
context, NCCL, workspaces of kernels, gaps of the allocator), the batch and its noise.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from sadm_fast.config import Config
from sadm_fast.planning import zero3
from sadm_fast.planning.players import Player, recomputes

# What a tensor is for: the columns of plan.py's memory table, and "other".
Kind = Literal["weights", "gradients", "optimizer", "EMA", "pictures", "activ.", "buckets", "other"]
# What lies in the host's memory: nothing; masters, moments and their gradients; also the divided weights of stage 3.
Offload = Literal["none", "optimizer", "optimizer and parameters"]

_FP32 = 4


@dataclass(frozen=True)
class Activations:
    """Bytes that autograd keeps between forward and backward of one micro-batch."""

    denoiser: int
    denoiser_checkpointed: int  # blocks recomputed in the backward pass: all their inputs, and one block's activations
    structure: int  # Psi in the denoiser's step
    discriminator: int  # Psi in its own step


class Drawing(NamedTuple):
    """Bytes of drawing samples on rank 0, beside the copies of the networks to look through (planning.drawing)."""

    held: dict[str, int]  # all the time
    moments: dict[str, int]  # besides, between two iterations
    left_out: str | None  # what is not counted


NO_DRAWING = Drawing({}, {}, None)


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, by tensor."""

    device: dict[str, int]  # held all the time, on the device
    host: dict[str, int]  # held all the time, offloaded
    moments: dict[str, dict[str, int]]  # on the device besides, at the moments when most is there
    kinds: dict[str, Kind]  # of every tensor named above

    @property
    def resident(self) -> int:
        """Bytes held on the device all the time."""
        return sum(self.device.values())

    @property
    def fullest(self) -> str:
        """The moment with the most bytes."""
        return max(self.moments, key=lambda moment: sum(self.moments[moment].values()))

    @property
    def peak(self) -> int:
        """Bytes on the device at the fullest moment."""
        return self.resident + sum(self.moments[self.fullest].values())

    @property
    def peak_by_kind(self) -> dict[Kind, int]:
        """`peak`, divided into every Kind."""
        totals: dict[Kind, int] = dict.fromkeys(get_args(Kind), 0)
        for what, size in [*self.device.items(), *self.moments[self.fullest].items()]:
            totals[self.kinds[what]] += size
        return totals


def width(config: Config) -> int:
    """Bytes of one element of the weights and gradients that the engines hold."""
    return 2 if config.train.precision == "bf16" else 4


def offload_of(config: Config) -> Offload:
    """Return what the configuration offloads."""
    zero = config.deepspeed.zero_optimization

    def asked(block: object) -> bool:
        return getattr(block, "device", "none") != "none"

    if asked(zero.offload_param):
        return "optimizer and parameters"
    return "optimizer" if asked(zero.offload_optimizer) else "none"


def rank_memory(
    config: Config,
    players: list[Player],
    activations: Activations,
    world_size: int,
    *,
    stage: int | None = None,
    offload: Offload | None = None,
    checkpointing: bool | None = None,
    feature_dim: int = 0,
    drawing: Drawing = NO_DRAWING,
) -> Memory:
    """Count the memory of rank 0. The other ranks hold less: without evaluations, no copies for pictures.

    Args:
        players: the denoiser and, if there is one, Psi, as players.players describes them.
        stage: ZeRO stage, 0 to 3. None, here and below: as configured.
        offload: anything but "none" needs stage 1 or higher; parameters need stage 3.
        checkpointing: activation checkpointing of the denoiser's blocks.
        feature_dim: length of Psi's features, for game.queue.
        drawing: of samples; left out if it is not given.
    """
    zero, w = config.deepspeed.zero_optimization, width(config)
    reduced_at_once = zero.buckets("cuda")["reduce_bucket_size"]
    stage = zero.stage if stage is None else stage
    offload = offload_of(config) if offload is None else offload
    checkpointing = config.train.activation_checkpointing if checkpointing is None else checkpointing
    kinds: dict[str, Kind] = {}

    def of(kind: Kind, tensor: str) -> str:
        kinds[tensor] = kind
        return tensor

    device: dict[str, int] = {}
    host: dict[str, int] = {}
    optimizer_at = device if offload == "none" else host
    weights_at = host if offload == "optimizer and parameters" else device
    engines = [player for player in players if player.has_engine]

    def share(player: Player) -> int:
        return math.ceil(player.trained / world_size) if stage >= 1 else player.trained

    for player in engines:
        name = player.name
        if stage < 3:
            device[of("weights", f"{name} weights")] = w * player.everything
        else:
            weights_at[of("weights", f"{name} weights, divided")] = w * zero3.partitioned(player, world_size)
            device[of("weights", f"{name} weights, always whole")] = w * zero3.persistent(player, zero)
            device[of("buckets", f"{name} reduction bucket")] = w * reduced_at_once
            optimizer_at[of("gradients", f"{name} gradients")] = w * share(player)
        # In fp32 without ZeRO the weights are their own masters; ZeRO keeps a second, divided copy.
        masters = 0 if w == _FP32 and stage == 0 else _FP32 * share(player)
        optimizer_at[of("optimizer", f"{name} fp32 masters")] = masters
        optimizer_at[of("optimizer", f"{name} AdamW moments")] = 2 * _FP32 * share(player)
        if offload != "none":
            host[of("gradients", f"{name} fp32 gradients")] = _FP32 * share(player)
            if stage < 3:
                host[of("weights", f"{name} new weights")] = w * share(player)  # on their way back to the device
                if config.train.grad_accumulation > 1:
                    host[of("gradients", f"{name} accumulated gradients")] = w * share(player)
                for at in (device, host):
                    at[of("other", f"{name} buffer of one gradient")] = w * max(player.parameters)
    for player in engines[1:]:  # a copy of the discriminator before its step, to take the step back
        kept = weights_at if stage == 3 else device
        elements = zero3.partitioned(player, world_size) if stage == 3 else player.trained
        kept[of("weights", f"copy of {player.name}'s weights")] = w * elements
        tensors = 2 if w == _FP32 and stage == 0 else 3  # both moments, and masters where there are any
        optimizer_at[of("optimizer", f"copy of {player.name}'s masters and moments")] = tensors * _FP32 * share(player)
    if config.game.queue:
        row = 2 * feature_dim * _FP32 + _FP32 + 8  # f, g, weight, label
        device[of("other", "feature queue")] = config.game.queue * row
    optimizer_at[of("EMA", "EMA")] = len(config.train.profiles) * _FP32 * share(players[0])
    for player in players:
        if not player.has_engine:
            device[of("weights", f"{player.name} weights")] = w * player.everything
        device[of("pictures", f"{player.name} copy for pictures")] = _FP32 * player.everything

    def gradients(player: Player) -> dict[str, int]:
        """Count gradients in the backward pass; stage 3 holds its gradients all the time."""
        if stage == 3:
            return {}
        if stage == 0:
            return {of("gradients", f"{player.name} gradients"): w * player.trained}
        held = 0 if offload != "none" else w * share(player)
        if stage == 1 and config.train.grad_accumulation > 1:
            held += w * player.trained  # the whole sum of the micro-batches so far, not yet reduced
        buckets = (2 if zero.overlap_comm else 1) * w * reduced_at_once
        return {
            of("gradients", f"{player.name} gradients"): held,
            of("buckets", f"{player.name} reduction bucket"): buckets,
        }

    def update(player: Player) -> dict[str, int]:
        """Count the optimizer's step: gradients in fp32 and in the weights' dtype. Fused AdamW needs nothing else."""
        if offload != "none":
            return {}
        low = {} if stage == 3 else {of("gradients", f"{player.name} gradients"): w * share(player)}
        converted = 0 if w == _FP32 and stage == 0 else _FP32 * share(player)
        return low | {of("gradients", f"{player.name} gradients for the update"): converted}

    whole = {}
    if stage == 3:
        whole = {
            of("weights", f"{player.name} weights, gathered"): w * zero3.gathered(player, zero).at_once
            for player in engines
        }
    own = activations.denoiser_checkpointed if checkpointing else activations.denoiser
    graph = {of("activ.", "denoiser activations"): own}
    moments: dict[str, dict[str, int]] = {}
    if len(engines) == 2:
        waiting = {} if recomputes(config) else graph  # the denoiser's forward serves both players
        in_use = {of("activ.", "Psi activations"): activations.discriminator}
        moments["discriminator's backward"] = waiting | in_use | gradients(engines[1]) | whole
        moments["discriminator's update"] = waiting | update(engines[1])
    in_use = {of("activ.", "Psi activations"): activations.structure} if len(players) == 2 else {}
    moments["denoiser's backward"] = graph | in_use | gradients(engines[0]) | whole
    moments["denoiser's update"] = update(engines[0])
    device |= {of("pictures", name): size for name, size in drawing.held.items()}
    moments |= {name: {of("pictures", name): size} for name, size in drawing.moments.items()}
    return Memory(device, host, moments, kinds)
