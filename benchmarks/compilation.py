"""What does compiling cost, and what does it bring: one graph for all blocks, one of the whole denoiser, or none?

    python benchmarks/compilation.py --depth 28 --hidden-size 64 --batch 8 --precision bf16

Forward and backward of a DiT on 32x32x4 latents in patches of 4, its weights in flat parameters as in training. The
first step is measured with an empty cache of Inductor, `--compilations` times; Inductor itself has been started before.
Later steps take turns. Prints a table.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch._inductor.utils import fresh_cache

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import measure  # noqa: E402
from benchmarks.report import aligned  # noqa: E402
from benchmarks.structure_loss import environment  # noqa: E402
from sadm_fast.engine.compilation import compile_in_place, why_not  # noqa: E402
from sadm_fast.engine.flat import Flat  # noqa: E402
from sadm_fast.models.dit import DiT  # noqa: E402

WAYS = ("eager", "blocks", "whole")
CLASSES = 10


def step(way: str, arguments: argparse.Namespace) -> Callable[[], None]:
    """A new network's forward and backward; it compiles at its first call."""
    dtype = torch.bfloat16 if arguments.precision == "bf16" else torch.float32
    with torch.device(arguments.device):
        sizes = {"hidden_size": arguments.hidden_size, "depth": arguments.depth, "num_heads": arguments.heads}
        network = DiT(32, 4, num_classes=CLASSES, **sizes).to(dtype)
        x, t, y = torch.randn(arguments.batch, 4, 32, 32), torch.rand(arguments.batch), torch.arange(arguments.batch)
    player = Flat(network, 2_000_000, network.blocks if way == "blocks" else ())
    if way == "blocks":
        compile_in_place(network)
    elif way == "whole":
        network.forward = torch.compile(network.forward, fullgraph=True, dynamic=False)

    def forward_and_backward() -> None:
        player(x, t, y % CLASSES).square().mean().backward()
        player.zero_grad()

    return forward_and_backward


def first_step(way: str, arguments: argparse.Namespace) -> float:
    """Seconds, from an empty cache."""
    torch._dynamo.reset()
    with fresh_cache():
        call = step(way, arguments)
        start = time.perf_counter()
        call()
        if arguments.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    for name, default in (("depth", 12), ("hidden-size", 384), ("heads", 6), ("batch", 16)):
        add(f"--{name}", type=int, default=default, metavar="N", help="(default %(default)s)")
    add("--precision", choices=("fp32", "bf16"), default="fp32")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--threads", type=int, default=1, help="CPU threads (default %(default)s)")
    add("--compilations", type=int, default=2, help="first steps (default %(default)s)")
    add("--repeats", type=int, default=15, help="later steps (default %(default)s)")
    arguments = parser.parse_args(argv)
    measure.use_threads(arguments.threads)
    reason = why_not(0, torch.device(arguments.device))
    if reason is not None:
        parser.error(f"nothing can be compiled here: {reason}")
    first = {way: [first_step(way, arguments) for _ in range(arguments.compilations)] for way in WAYS[1:]}
    torch._dynamo.reset()
    calls = {way: step(way, arguments) for way in WAYS}
    for call in calls.values():
        call()
    later = measure.interleaved(calls, arguments.repeats, arguments.device)
    lines = [["", "first step, s", "later steps, ms (p20-p80)", "/ eager"]]
    for way in WAYS:
        low, middle, high = (1e3 * value for value in measure.spread(later[way]))
        seconds = ", ".join(f"{value:.1f}" for value in first.get(way, []))
        ratio = measure.ratio(later[way], later["eager"])
        lines.append([way, seconds, f"{middle:.0f} ({low:.0f}-{high:.0f})", f"{ratio:.2f}"])
    about = environment(arguments.device, arguments.threads)
    print(f"{about['machine']}, {about['threads']} threads, torch {about['torch']}, {about['commit']}")
    print(aligned(lines, markdown=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
