"""What does the optimizer's one pass save? It and torch's operations for the same step take turns; prints a table.

    python benchmarks/optimizer_step.py --sizes 1048576 8388608 [--device cuda]

Both clip, take AdamW's step, move one average and round the weights, on one flat buffer and with a norm that is known.
GB/s are those of the pass: bytes_per_element without the norm's reading, over its time.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import measure  # noqa: E402
from benchmarks.report import aligned  # noqa: E402
from benchmarks.structure_loss import environment  # noqa: E402
from sadm_kernels import native  # noqa: E402
from sadm_kernels.adamw import adamw_step, bytes_per_element  # noqa: E402

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NUMBERS = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
MAX_NORM, DECAY = 1.0, 0.9999


class Step:
    """The buffers of a step, and both ways to take it."""

    def __init__(self, n: int, gradient: torch.dtype, device: str) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal() -> Tensor:
            return torch.randn(n, generator=generator).to(device)

        self.master, self.average, self.gradient = normal(), normal(), normal().to(gradient)
        self.weight = torch.zeros(n, dtype=torch.bfloat16, device=device)
        self.moments = [torch.zeros(n, device=device) for _ in range(2)]
        self.norm = torch.tensor(n**0.5, device=device)
        self.parameter = torch.nn.Parameter(self.master.clone())
        self.parameter.grad = self.gradient.float()
        self.optimizer = torch.optim.AdamW([self.parameter], fused=True, **NUMBERS)
        self.number = 0

    def one_pass(self) -> None:
        self.number += 1
        adamw_step(
            self.master, self.gradient, *self.moments, [self.average], self.weight,
            norm=self.norm, max_norm=MAX_NORM, step=self.number, decays=[DECAY], **NUMBERS,
        )  # fmt: skip

    @torch.no_grad()
    def torchs(self) -> None:
        """Widen, scale, fused AdamW, foreach average, foreach copy."""
        gradient = self.parameter.grad
        assert gradient is not None
        gradient.copy_(self.gradient)
        torch.nn.utils.clip_grads_with_norm_([self.parameter], MAX_NORM, self.norm)
        self.optimizer.step()
        torch._foreach_lerp_([self.average], [self.parameter], 1 - DECAY)
        torch._foreach_copy_([self.weight], [self.parameter])

    @torch.no_grad()
    def torchs_without_clipping(self) -> None:
        """Fused AdamW, foreach average, foreach copy: what is left to beat where nothing is clipped or widened."""
        self.optimizer.step()
        torch._foreach_lerp_([self.average], [self.parameter], 1 - DECAY)
        torch._foreach_copy_([self.weight], [self.parameter])

    @property
    def ways(self) -> dict[str, measure.Call]:
        return {"one pass": self.one_pass, "torch": self.torchs, "torch, no clip": self.torchs_without_clipping}


def measure_case(n: int, gradient: str, device: str, repeats: int) -> list[str]:
    """Time one size: a line of the table."""
    ways = Step(n, DTYPES[gradient], device).ways
    for way in ways.values():
        way()
    samples = measure.interleaved(ways, repeats, device)
    times = ["{1:.3g} ({0:.3g}-{2:.3g})".format(*(1e3 * s for s in measure.spread(samples[name]))) for name in ways]
    ours, *others = samples.values()
    moved = n * (bytes_per_element(DTYPES[gradient], torch.bfloat16, averages=1) - DTYPES[gradient].itemsize)
    rate = moved / measure.spread(ours)[1] / 1e9
    return [str(n), gradient, *times, *(f"{measure.ratio(other, ours):.2f}" for other in others), f"{rate:.3g}"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--sizes", nargs="+", type=int, default=[1 << 20, 1 << 23], metavar="N", help="elements")
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--threads", type=int, default=2, help="(default %(default)s)")
    add("--repeats", type=int, default=21, help="rounds in which each way runs once (default %(default)s)")
    add("--markdown", action="store_true", help="print the table as Markdown")
    arguments = parser.parse_args(argv)
    measure.use_threads(arguments.threads)
    cases = itertools.product(arguments.sizes, DTYPES)
    lines = [measure_case(*case, arguments.device, arguments.repeats) for case in cases]
    about = environment(arguments.device, arguments.threads)
    way = native.instruction_set() if arguments.device == "cpu" else "triton"
    print(f"{about['machine']}, {way}, {arguments.threads} threads, torch {about['torch']},", end=" ")
    print(f"commit {about['commit']}, {about['date'][:10]}; median of {arguments.repeats} rounds (p20-p80)\n")
    times = ("one pass", "torch", "torch, no clip")
    head = ["n", "gradient", *(f"{name}, ms" for name in times), *(f"{name} / one pass" for name in times[1:]), "GB/s"]
    print(aligned([head, *lines], arguments.markdown))
    return 0


if __name__ == "__main__":
    sys.exit(main())
