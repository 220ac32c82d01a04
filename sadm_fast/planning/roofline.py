"""Predict the time of a step from counts, the manufacturer's peaks, and what was measured of them (measured.py).

    compute        FLOPs / (fraction_of_peak * peak FLOP/s of the dtype)
    update         bytes that AdamW and the EMA read and write / (fraction_of_bandwidth * memory bandwidth)
    communication  bytes that a ring sends / (fraction_of_bandwidth * links)
    host           launches * seconds a launch takes the host

links: inside a node, the rate at which one GPU sends to the others. Across nodes NCCL builds a ring for each network
adapter, so all adapters of a node carry the traffic together, limited by the slowest link of a ring.

On the device a step takes the sum of the first three if nothing overlaps, and max(compute, communication) + update if
all communication is hidden behind compute. The host launches ahead of it: a step takes the longer of the two. Left out:
latency, reading data and checkpoints.
"""

from dataclasses import dataclass

import torch

from sadm_fast.config import Config
from sadm_fast.planning.communication import Transfer
from sadm_fast.planning.gpus import Gpu
from sadm_fast.planning.measured import FRACTION_OF_BANDWIDTH, FRACTION_OF_PEAK, SECONDS_A_LAUNCH
from sadm_fast.planning.players import Player
from sadm_kernels.adamw import bytes_per_element

GPUS_PER_NODE = 8
NETWORK_GBIT = 400.0


@dataclass(frozen=True)
class Assumptions:
    """The hardware and the fractions of its peaks that the prediction assumes."""

    gpu: Gpu
    gpus_per_node: int = GPUS_PER_NODE
    network_gbit: float = NETWORK_GBIT  # of each GPU's share of the network, in one direction
    fraction_of_peak: float = FRACTION_OF_PEAK.value
    fraction_of_bandwidth: float = FRACTION_OF_BANDWIDTH.value
    seconds_a_launch: float = SECONDS_A_LAUNCH.value

    def links(self, world_size: int) -> float:
        """Return the peak bytes/s from each rank to the next, in a ring of `world_size` ranks."""
        if world_size <= self.gpus_per_node:
            return self.gpu.link
        return min(self.gpu.link, self.gpus_per_node * self.network_gbit * 1e9 / 8)

    def peak(self, config: Config) -> float:
        """Return the peak FLOP/s of the run's dtype; fp32 without TF32, which is off in PyTorch and stays off here."""
        return self.gpu.bf16 if config.train.precision == "bf16" else self.gpu.fp32


@dataclass(frozen=True)
class StepTime:
    """Predicted seconds of one step of one rank."""

    compute: float
    update: float
    communication: float
    host: float

    @property
    def exposed(self) -> float:
        """Seconds if communication does not overlap compute."""
        return max(self.compute + self.update + self.communication, self.host)

    @property
    def hidden(self) -> float:
        """Seconds if communication overlaps compute as far as compute lasts."""
        return max(max(self.compute, self.communication) + self.update, self.host)


def update_bytes(config: Config, players: list[Player], world_size: int, stage: int) -> float:
    """Count the bytes that the optimizers and the EMA read and write: each tensor once for each access."""
    total = 0.0
    for player in players:
        if not player.has_engine:
            continue
        share = player.trained / (world_size if stage >= 1 else 1)
        # One pass (kernels/adamw.py), without the averages; then those of the denoiser, read and written in it.
        weight = torch.bfloat16 if config.train.precision == "bf16" else None
        of_a_step = bytes_per_element(weight or torch.float32, weight, averages=0)
        averages = 2 * 4 * len(config.train.profiles) if player.name == "denoiser" else 0
        total += share * (player.steps * of_a_step + averages)
    return total


def step_time(
    config: Config,
    players: list[Player],
    flops: float,
    moved: list[Transfer],
    assumptions: Assumptions,
    world_size: int,
    stage: int,
    launched: int,
) -> StepTime:
    """Predict the step of one of `world_size` ranks.

    It computes `flops`, takes part in the transfers `moved`, and launches `launched` kernels.
    """
    rate = assumptions.fraction_of_bandwidth
    wire = sum(transfer.wire(world_size) for transfer in moved)
    return StepTime(
        compute=flops / (assumptions.fraction_of_peak * assumptions.peak(config)),
        update=update_bytes(config, players, world_size, stage) / (rate * assumptions.gpu.bandwidth),
        communication=wire / (rate * assumptions.links(world_size)),
        host=launched * assumptions.seconds_a_launch,
    )
