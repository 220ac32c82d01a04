"""Bytes of one rank, by purpose: what is there all the time, and what each moment of an iteration adds.

Counted are tensors that the trainer and DeepSpeed (0.19.8) hold. Not counted are what libraries take for themselves
(CUDA context, NCCL, workspaces of kernels, gaps of the allocator), the batch and its noise, and, on rank 0, the
autoencoder that decodes the pictures of a run on latents.
"""

import math
from dataclasses import dataclass
from typing import Literal

from sadm_fast.config import Config
from sadm_fast.planning import zero3
from sadm_fast.planning.players import Player, recomputes

# What goes to the host's memory: nothing; masters, moments and their gradients; the divided weights of stage 3 too.
Offload = Literal["none", "optimizer", "optimizer and parameters"]

_FP32 = 4


@dataclass(frozen=True)
class Activations:
    """Bytes that autograd keeps between forward and backward of one micro-batch."""

    denoiser: int
    denoiser_checkpointed: int  # with each block recomputed in the backward pass: its inputs, and one block's insides
    structure: int  # Psi in the denoiser's step
    discriminator: int  # Psi in its own step


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    device: dict[str, int]  # held all the time
    host: dict[str, int]  # the same, offloaded
    moments: dict[str, dict[str, int]]  # what is there besides, at the four times when most is

    @property
    def resident(self) -> int:
        """Held on the device all the time."""
        return sum(self.device.values())

    @property
    def fullest(self) -> str:
        """The moment that needs most."""
        return max(self.moments, key=lambda moment: sum(self.moments[moment].values()))

    @property
    def peak(self) -> int:
        """Most bytes on the device at once."""
        return self.resident + sum(self.moments[self.fullest].values())


def width(config: Config) -> int:
    """Bytes of a weight or gradient as the engines hold it."""
    return 2 if config.train.precision == "bf16" else 4


def offload_of(config: Config) -> Offload:
    """What the configuration itself asks for."""
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
) -> Memory:
    """The plan of rank 0; without evaluation the other ranks hold no copies for pictures.

    Args:
        players: both of them, as players.players describes them.
        stage: of ZeRO, 0 to 3; None: the configuration's.
        offload: None: the configuration's. Only from stage 1 on, and of parameters at stage 3.
        checkpointing: activation checkpointing of the denoiser's blocks; None: the configuration's.
        feature_dim: of Psi, for game.queue.
    """
    zero, w = config.deepspeed.zero_optimization, width(config)
    reduced_at_once = zero.buckets("cuda")["reduce_bucket_size"]
    stage = zero.stage if stage is None else stage
    offload = offload_of(config) if offload is None else offload
    checkpointing = config.train.activation_checkpointing if checkpointing is None else checkpointing
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
            device[f"{name} weights"] = w * player.everything
        else:
            weights_at[f"{name} weights, divided"] = w * zero3.partitioned(player, world_size)
            device[f"{name} weights, always whole"] = w * zero3.persistent(player, zero)
            device[f"{name} reduction bucket"] = w * reduced_at_once
            optimizer_at[f"{name} gradients"] = w * share(player)
        # In fp32 without ZeRO the weights are their own masters; ZeRO keeps a second, divided copy.
        optimizer_at[f"{name} fp32 masters"] = 0 if w == _FP32 and stage == 0 else _FP32 * share(player)
        optimizer_at[f"{name} AdamW moments"] = 2 * _FP32 * share(player)
        if offload != "none":
            host[f"{name} fp32 gradients"] = _FP32 * share(player)
            if stage < 3:
                host[f"{name} new weights"] = w * share(player)  # on their way back to the device
                if config.train.grad_accumulation > 1:
                    host[f"{name} accumulated gradients"] = w * share(player)
                for at in (device, host):
                    at[f"{name} buffer of one gradient"] = w * max(player.parameters)
    for player in engines[1:]:  # the discriminator as it was, to take its step back
        kept = weights_at if stage == 3 else device
        kept[f"copy of {player.name}'s weights"] = w * (
            zero3.partitioned(player, world_size) if stage == 3 else player.trained
        )
        separate = 0 if w == _FP32 and stage == 0 else 1
        optimizer_at[f"copy of {player.name}'s masters and moments"] = (2 + separate) * _FP32 * share(player)
    if config.game.queue:
        device["feature queue"] = config.game.queue * (2 * feature_dim * _FP32 + _FP32 + 8)  # and weights, labels
    optimizer_at["EMA"] = _FP32 * share(players[0])
    for player in players:
        if not player.has_engine:
            device[f"{player.name} weights"] = w * player.everything
        device[f"{player.name} copy for pictures"] = _FP32 * player.everything

    def gradients(player: Player) -> dict[str, int]:
        """In the backward pass; stage 3 has its own all the time."""
        if stage == 3:
            return {}
        if stage == 0:
            return {f"{player.name} gradients": w * player.trained}
        held = 0 if offload != "none" else w * share(player)
        if stage == 1 and config.train.grad_accumulation > 1:
            held += w * player.trained  # whole ones, until the last micro-batch's are reduced
        buckets = (2 if zero.overlap_comm else 1) * w * reduced_at_once if zero.contiguous_gradients else 0
        return {f"{player.name} gradients": held, f"{player.name} reduction bucket": buckets}

    def update(player: Player) -> dict[str, int]:
        """In the optimizer's step: gradients in fp32 beside those in the weights' dtype. Fused AdamW needs no more."""
        if offload != "none":
            return {}
        low = {} if stage == 3 else {f"{player.name} gradients": w * share(player)}
        converted = 0 if w == _FP32 and stage == 0 else _FP32 * share(player)
        return low | {f"{player.name} gradients for the update": converted}

    whole = {}
    if stage == 3:
        whole = {f"{player.name} weights, gathered": w * zero3.gathered(player, zero).at_once for player in engines}
    own = activations.denoiser_checkpointed if checkpointing else activations.denoiser
    graph = {"denoiser activations": own}
    moments: dict[str, dict[str, int]] = {}
    if len(engines) == 2:
        waiting = {} if recomputes(config) else graph  # the denoiser's forward serves both players
        in_use = {"Psi activations": activations.discriminator}
        moments["discriminator's backward"] = waiting | in_use | gradients(engines[1]) | whole
        moments["discriminator's update"] = waiting | update(engines[1])
    in_use = {"Psi activations": activations.structure} if len(players) == 2 else {}
    moments["denoiser's backward"] = graph | in_use | gradients(engines[0]) | whole
    moments["denoiser's update"] = update(engines[0])
    return Memory(device, host, moments)
