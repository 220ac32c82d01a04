"""What was measured of this program, and where: the planner's fractions, and the cost of a launch.

On any other GPU, precision or network these numbers are assumptions, and are printed as such.
"""

from typing import NamedTuple

from sadm_fast.config import Config


class Measured(NamedTuple):
    """A number and the run that it comes from."""

    value: float
    gpu: str  # key of gpus.GPUS
    precision: str
    where: str


_H200 = "one H200, DiT-XL/2 at 256 pixels, micro-batch 64, compiled, torch 2.11, 2026-11-27, commit 4460c4a"

# An iteration of plain training: 103.0 ms of kernels, of which 5.95 are the update; 45.6 TFLOP in the other 97.0.
FRACTION_OF_PEAK = Measured(0.475, "h200", "bf16", _H200)
# The update: 36 bytes of 675 M elements in 5.95 ms are 4.08 of 4.8 TB/s.
FRACTION_OF_BANDWIDTH = Measured(0.85, "h200", "bf16", _H200)
# 122.6 ms for 2,276 kernels (plain), 163.7 for 2,933 (sadm), when the host was what the time went into: 54 and 56 us.
# Most of it is Python between the launches: with 7,595 of them, at 14be34f, it was 21 us.
SECONDS_A_LAUNCH = Measured(54e-6, "h200", "bf16", _H200)

# Counted by benchmarks/launches.py (ZeRO-1, bf16, ResNet-18), forward and backward of one micro-batch.
_EAGER_BLOCK = 59
_COMPILED_BLOCK = 71  # of the 2,276: with the parts of Inductor's reductions, copies, and adaLN's sums
_STEM = 52  # of a DiT beside its blocks
_PSI = {"plain": 0, "structure": 203, "sadm": 347}
_BESIDE = {"plain": 225, "structure": 245, "sadm": 350}  # draw, objectives, engines, optimizer
# As CUDA graphs: for each way to call a player two replays, and copies of inputs, output and flat gradients.
_REPLAYED = 24
_WAYS = {"plain": 1, "structure": 3, "sadm": 4}
# Stage 3 and the reference implementation step and gather parameter by parameter.
_EACH_PARAMETER = 20


def launches(config: Config, depth: int, parameters: int) -> int:
    """About how many kernels one rank launches in an iteration.

    depth: of the denoiser. parameters: trained tensors of both players.
    """
    block = _EAGER_BLOCK if config.train.compile == "off" else _COMPILED_BLOCK
    networks = depth * block + _STEM + _PSI[config.game.mode]
    if config.train.compile == "graphs":
        networks = _REPLAYED * _WAYS[config.game.mode]
    each = config.deepspeed.zero_optimization.stage == 3 or config.implementation == "reference"
    found = config.train.grad_accumulation * networks + _BESIDE[config.game.mode]
    return found + (_EACH_PARAMETER * parameters if each else 0)
