"""What does compiling cost and bring: one graph for all blocks, of the whole denoiser, of a convolutional Psi, or none?

    python benchmarks/compilation.py --depth 28 --hidden-size 64 --batch 8 --precision bf16

Forward and backward of a DiT on 32x32x4 latents, its weights in flat parameters as in training, and of a ResNet-18 as
Psi in each way that the game calls it; training leaves that one eager. Compiling is measured with an empty cache,
`--compilations` times: CPU seconds of this process + those of the compilers that it starts, one after another. Later
steps take turns. Prints a table.
"""

import argparse
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch._inductor import config as inductor
from torch._inductor.utils import fresh_cache

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import measure  # noqa: E402
from benchmarks.report import aligned  # noqa: E402
from benchmarks.structure_loss import environment  # noqa: E402
from sadm_fast.engine.compilation import compile_in_place, why_not  # noqa: E402
from sadm_fast.engine.flat import Flat  # noqa: E402
from sadm_fast.models.dit import DiT  # noqa: E402
from sadm_fast.models.structure_encoder import ResNet18  # noqa: E402

WAYS = ("eager", "blocks", "whole")
COMPILED = ", compiled"
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


def ways_of_psi(arguments: argparse.Namespace, compiled: bool) -> dict[str, Callable[[], None]]:
    """A new Psi as the game calls it: a ResNet-18 in its own step, and frozen."""
    dtype = torch.bfloat16 if arguments.precision == "bf16" else torch.float32
    with torch.device(arguments.device):
        psi = ResNet18(4, "small").to(dtype)
        x0, xhat0 = torch.randn(arguments.batch, 4, 32, 32), torch.randn(arguments.batch, 4, 32, 32, requires_grad=True)
    if compiled:
        psi.forward = torch.compile(psi.forward, fullgraph=True, dynamic=False)

    def frozen(x: Tensor) -> None:
        psi.requires_grad_(False)
        with torch.set_grad_enabled(x.requires_grad):
            features = psi(x)
        if x.requires_grad:
            features.sum().backward()
        psi.requires_grad_(True)

    def own() -> None:
        psi(torch.cat([x0, xhat0.detach()])).sum().backward()
        psi.zero_grad()

    ways = {"Psi, own step": own, "Psi, frozen, x0": lambda: frozen(x0), "Psi, frozen, xhat0": lambda: frozen(xhat0)}
    return {name + COMPILED * compiled: call for name, call in ways.items()}


def compilation(call: Callable[[], None]) -> str:
    """CPU seconds that the first call takes more than the second: of this process, and of compilers that it started."""
    torch._dynamo.reset()
    begin, middle, end = _seconds(), (call(), _seconds())[1], (call(), _seconds())[1]
    here, compilers = (2 * b - a - c for a, b, c in zip(begin, middle, end, strict=True))
    return f"{here:.1f} + {compilers:.1f}"


def _seconds() -> tuple[float, float]:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time(), children.ru_utime + children.ru_stime


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    for name, default in (("depth", 12), ("hidden-size", 384), ("heads", 6), ("batch", 16)):
        add(f"--{name}", type=int, default=default, metavar="N", help="(default %(default)s)")
    add("--precision", choices=("fp32", "bf16"), default="fp32")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--threads", type=int, default=1, help="CPU threads (default %(default)s)")
    add("--compilations", type=int, default=2, help="times that each is compiled (default %(default)s)")
    add("--repeats", type=int, default=15, help="later steps (default %(default)s)")
    arguments = parser.parse_args(argv)
    measure.use_threads(arguments.threads)
    reason = why_not(0, torch.device(arguments.device))
    if reason is not None:
        parser.error(f"nothing can be compiled here: {reason}")
    inductor.compile_threads = 1  # compilers are then children of this process
    first: dict[str, list[str]] = {}
    for _ in range(arguments.compilations):
        for name, call in ({way: step(way, arguments) for way in WAYS[1:]} | ways_of_psi(arguments, True)).items():
            with fresh_cache():
                first.setdefault(name, []).append(compilation(call))
    torch._dynamo.reset()
    calls = {way: step(way, arguments) for way in WAYS} | ways_of_psi(arguments, False) | ways_of_psi(arguments, True)
    for call in calls.values():
        call()
    later = measure.interleaved(calls, arguments.repeats, arguments.device)
    lines = [["", "compiling, s", "later steps, ms (p20-p80)", "/ eager"]]
    for name, seconds in later.items():
        eager = later["eager" if name in WAYS else name.removesuffix(COMPILED)]
        low, middle, high = (1e3 * value for value in measure.spread(seconds))
        times = [f"{middle:.0f} ({low:.0f}-{high:.0f})", f"{measure.ratio(seconds, eager):.2f}"]
        lines.append([name, ", ".join(first.get(name, [])), *times])
    about = environment(arguments.device, arguments.threads)
    print(f"{about['machine']}, {about['threads']} threads, torch {about['torch']}, {about['commit']}")
    print(aligned(lines, markdown=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
