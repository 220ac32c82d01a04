"""What does a call of the structure loss launch on a GPU, and how long does its Python take? Counted on any machine.

    python benchmarks/loss_launches.py [--rows 64 --features 512 --rounds 15 --markdown]

Forward and backward of S with both gradients, by the Triton backend on CPU tensors: its kernels are taken down in place
of being run, torch's own operations run. Views launch nothing and are not counted; a padding is two launches. Times are
CPU time; those of torch's operations include their arithmetic on few rows, those of the kernels not Triton's launching.
"""

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import measure  # noqa: E402
from benchmarks.launches import Count  # noqa: E402
from benchmarks.report import Row, aligned  # noqa: E402
from benchmarks.structure_loss import environment  # noqa: E402
from sadm_fast.ranks.launch import distributed  # noqa: E402
from sadm_kernels import ops  # noqa: E402
from sadm_kernels.samples import Options, Samples  # noqa: E402
from sadm_kernels.triton import few, launch  # noqa: E402

CALLS = 40  # of a round
QUEUED = 1024  # rows of the queue


class Kernels:
    """Stands in for the modules of kernels: counts launches and does none."""

    def __init__(self) -> None:
        self.launched = 0

    def __getattr__(self, name: str) -> Any:
        return defaultdict(lambda: self._launch)

    def _launch(self, *_: Any, **__: Any) -> None:
        self.launched += 1


@contextmanager
def no_kernels() -> Iterator[Kernels]:
    """Take launches of the Triton backend down inside."""
    kernels = Kernels()
    machine = launch.Machine(kernels, 90)
    with (
        mock.patch.object(launch, "machine_of", lambda _: machine),
        mock.patch.object(few, "kernels_of", lambda _: kernels),
    ):
        yield kernels


def variants(rows: int, d: int) -> dict[str, Callable[[], None]]:
    """Calls by name: forward and backward of each way to ask for S."""

    def call(
        dtype: torch.dtype = torch.bfloat16, d: int = d, queued: int = 0, group: Any = None, **options: Any
    ) -> Callable[[], None]:
        real, fake = (torch.randn(rows, d, dtype=dtype, requires_grad=True) for _ in range(2))
        past_real, past_fake = torch.randn(2, queued, d, dtype=dtype)
        queue = Samples(past_real, past_fake) if queued else None
        chosen, one = Options(**options), torch.ones(())

        def forward_and_backward() -> None:
            loss = ops.structure_loss("triton", Samples(real, fake), chosen, queue=queue, group=group)
            torch.autograd.grad(loss, (real, fake), one)

        return forward_and_backward

    return {
        "bfloat16": call(),
        "float32": call(torch.float32),
        f"{d - 12} features": call(d=d - 12),
        "normalize=mean": call(normalize="mean"),
        f"queue of {QUEUED}": call(queued=QUEUED),
        "group of one rank": call(group=dist.group.WORLD),
    }


def measured(name: str, call: Callable[[], None], rounds: int) -> Row:
    """Count and time one variant."""
    with no_kernels() as kernels:
        call()
        kernels.launched = 0
        with Count() as count:
            call()
        ours = kernels.launched
        seconds = []
        for _ in range(rounds):
            begin = time.process_time()
            for _ in range(CALLS):
                call()
            seconds.append((time.process_time() - begin) / CALLS)
    low, middle, high = (1e6 * value for value in measure.spread(seconds))
    operations = count.found.total() + count.found["aten.constant_pad_nd"]
    sent = sum(number for operation, number in count.found.items() if operation.startswith("c10d."))
    return {
        "variant": name,
        "kernels": ours,
        "operations": operations - sent,
        "collectives": sent,
        "us": f"{middle:.0f} ({low:.0f}-{high:.0f})",
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rows", type=int, default=64, metavar="B", help="(default %(default)s)")
    add("--features", type=int, default=512, metavar="D", help="a multiple of 16 (default %(default)s)")
    add("--rounds", type=int, default=15, help="of 40 calls each (default %(default)s)")
    add("--markdown", action="store_true", help="print the table as Markdown")
    arguments = parser.parse_args(argv)
    measure.use_threads(1)
    with distributed():
        calls = variants(arguments.rows, arguments.features)
        rows = [measured(name, call, arguments.rounds) for name, call in calls.items()]
    about = environment("cpu", 1)
    print(f"{about['machine']}, 1 thread, torch {about['torch']}, {about['commit']}, {about['date'][:10]}")
    print(f"{arguments.rows} rows, {arguments.features} features, both gradients\n")
    head = ["", "kernels", "torch's operations", "collectives", "CPU time, us (p20-p80)"]
    print(aligned([head, *([str(value) for value in row.values()] for row in rows)], arguments.markdown))
    return 0


if __name__ == "__main__":
    sys.exit(main())
