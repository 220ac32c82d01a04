"""How much faster is the CPU kernel in bfloat16? Passes in both dtypes take turns; prints a table.

    python benchmarks/structure_dtypes.py --sizes 1024 4096 --dims 128 512

A pass is one call of the kernel, loss and gradients, without autograd: that takes the same time in both dtypes.
`structure_loss.py` times the whole call, beside its peers.
"""

import argparse
import itertools
import sys
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import measure  # noqa: E402
from benchmarks.report import aligned  # noqa: E402
from benchmarks.structure_loss import environment  # noqa: E402
from sadm_kernels import native  # noqa: E402
from sadm_kernels.samples import Pairs, Samples  # noqa: E402

TARGET = 1.8
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def one_pass(rows: int, width: int, dtype: torch.dtype, both: bool) -> measure.Call:
    """Return a call of the kernel on features of its own, with the loss's default options."""
    real, fake = torch.randn(2, rows, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    return partial(native.loss_and_gradients, Pairs(Samples(real, fake), range(rows)), None, both, True)


def measure_case(rows: int, width: int, both: bool, repeats: int) -> list[str]:
    """Time one problem: a line of the table."""
    calls = {name: one_pass(rows, width, dtype, both) for name, dtype in DTYPES.items()}
    samples = measure.interleaved(calls, repeats, "cpu")
    times = ["{1:.3g} ({0:.3g}-{2:.3g})".format(*(1e3 * s for s in measure.spread(samples[name]))) for name in calls]
    ratio = measure.ratio(samples["float32"], samples["bfloat16"])
    return [str(rows), str(width), "both" if both else "fake", *times, f"{ratio:.2f}"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--sizes", nargs="+", type=int, default=[1024, 4096, 8192], metavar="B", help="batch sizes")
    add("--dims", nargs="+", type=int, default=[128, 512], metavar="D", help="feature widths")
    add("--threads", type=int, default=2, help="(default %(default)s)")
    add("--repeats", type=int, default=15, help="rounds in which each dtype runs once (default %(default)s)")
    add("--markdown", action="store_true", help="print the table as Markdown")
    arguments = parser.parse_args(argv)
    measure.use_threads(arguments.threads)
    cases = list(itertools.product(arguments.sizes, arguments.dims, (False, True)))
    lines = [
        measure_case(*case, arguments.repeats)
        for case in track(cases, "bfloat16 against float32", console=Console(stderr=True))
    ]
    about = environment("cpu", arguments.threads)
    print(
        f"{about['machine']}, {native.instruction_set()}, {arguments.threads} threads, torch {about['torch']},", end=" "
    )
    print(f"commit {about['commit']}, {about['date'][:10]}; median of {arguments.repeats} rounds (p20-p80)\n")
    head = ["B", "d", "gradients", *(f"{name}, ms" for name in DTYPES), f"times as fast (target {TARGET})"]
    print(aligned([head, *lines], arguments.markdown))
    return 0


if __name__ == "__main__":
    sys.exit(main())
