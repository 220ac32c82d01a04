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


_H200 = "one H200, DiT-XL/2 at 256 pixels, micro-batch 64, torch.compile, torch 2.11, 2026-11-26"

# 522 images/s in 123 ms: our networks and objectives with bf16 weights, fp32 masters, fused AdamW and foreach copies.
# Of that the update takes 7 ms at 0.78 of the bandwidth; 45.6 TFLOP in the other 116 ms are 0.40 of 989 TFLOP/s.
FRACTION_OF_PEAK = Measured(0.40, "h200", "bf16", _H200)
# The device copied 4.26 of 4.8 TB/s; AdamW took 5.4 ms for 30 bytes an element of 675 M, which are 3.75 TB/s.
FRACTION_OF_BANDWIDTH = Measured(0.78, "h200", "bf16", _H200)
# 158 ms for 7,595 launches (plain) and 205 ms for 9,421 (game), when launching was all that the time went into.
SECONDS_A_LAUNCH = Measured(21e-6, "h200", "bf16", f"{_H200}, at commit 14be34f")

# Counted by benchmarks/launches.py (ZeRO-1, bf16, ResNet-18), forward and backward of one micro-batch.
_EAGER_BLOCK, _COMPILED_BLOCK = 59, 36  # of a DiT; compiled: about 1,000 of 28 blocks on the H200
_STEM = 52  # of a DiT beside its blocks
_PSI = {"plain": 0, "structure": 203, "sadm": 347}
_BESIDE = {"plain": 225, "structure": 245, "sadm": 350}  # draw, objectives, engines, optimizer
# Stage 3 and the reference implementation step and gather parameter by parameter.
_EACH_PARAMETER = 20


def launches(config: Config, depth: int, parameters: int) -> int:
    """About how many kernels one rank launches in an iteration.

    depth: of the denoiser. parameters: trained tensors of both players.
    """
    block = _EAGER_BLOCK if config.train.compile == "off" else _COMPILED_BLOCK
    networks = depth * block + _STEM + _PSI[config.game.mode]
    each = config.deepspeed.zero_optimization.stage == 3 or config.implementation == "reference"
    found = config.train.grad_accumulation * networks + _BESIDE[config.game.mode]
    return found + (_EACH_PARAMETER * parameters if each else 0)
