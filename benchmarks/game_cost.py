"""What does the game cost? One iteration of each mode, beside plain training; prints a table, writes it as CSV.

    python benchmarks/game_cost.py --precisions fp32 bf16 --stages 0 2 --stems imagenet small --out runs/game_cost

DiT-S/4 on 32x32x4 latents with ResNet-18 as Psi through DeepSpeed on one rank: plain (no game), structure (Psi fixed),
sadm (the fast path) and reference (sadm by implementation=reference: a second denoiser forward, the eager loss). They
take turns within each repeat, and ratios are taken within a repeat. Beside them stands the ratio of the FLOPs
(planning.cost.step_flops): products and convolutions, without the optimizer's work and all else.
"""

import argparse
import csv
import itertools
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import measure  # noqa: E402
from benchmarks.latent_game import CLASSES, game_config, iteration  # noqa: E402
from benchmarks.report import Row, aligned  # noqa: E402
from benchmarks.structure_loss import environment  # noqa: E402
from sadm_fast.config import Config  # noqa: E402
from sadm_fast.planning.cost import meta_models, step_flops  # noqa: E402
from sadm_fast.ranks.launch import distributed  # noqa: E402

WAYS = ("plain", "structure", "sadm", "reference")
COLUMNS = (
    *("commit", "date", "machine", "threads", "torch", "deepspeed", "device"),
    *("precision", "zero_stage", "stem", "compiled", "micro_batch", "iteration"),
    *("median_ms", "p20_ms", "p80_ms", "ratio_to_plain", "flops_ratio", "allowed"),
)
AT_MOST, OVER_IDEAL = 1.25, 1.15  # target: the larger of AT_MOST and OVER_IDEAL times the ratio of FLOPs
WARMUP = 2  # the first iteration allocates DeepSpeed's buffers and AdamW's moments


class Case(NamedTuple):
    """One setup of the players."""

    precision: str
    zero_stage: int
    stem: str  # of Psi: of a 32x32 latent, "imagenet" leaves 8x8 cells and "small" 32x32
    compiled: bool
    micro_batch: int

    def config(self, way: str) -> Config:
        return game_config(
            "sadm" if way == "reference" else way,
            micro_batch=self.micro_batch,
            implementation="reference" if way == "reference" else "fast",
            structure_encoder={"stem": self.stem},
            train={"precision": self.precision, "compile": self.compiled and way != "reference"},
            zero_optimization={"stage": self.zero_stage},
        )

    def flops(self, way: str) -> int:
        """Count the FLOPs of one iteration."""
        config = self.config(way)
        return sum(step_flops(config, *meta_models(config, CLASSES)).values())


def measure_case(case: Case, repeats: int, device: torch.device) -> list[Row]:
    """Time one setup: a row for each way."""
    calls = {way: iteration(case.config(way), device) for way in WAYS}
    for call in calls.values():
        for _ in range(WARMUP):
            call()
    samples = measure.interleaved(calls, repeats, device.type)
    plain = case.flops("plain")
    rows = []
    for way, times in samples.items():
        low, middle, high = measure.spread(times)
        ideal = case.flops(way) / plain
        rows.append(
            {
                **case._asdict(),
                "iteration": way,
                "median_ms": 1e3 * middle,
                "p20_ms": 1e3 * low,
                "p80_ms": 1e3 * high,
                "ratio_to_plain": measure.ratio(times, samples["plain"]),
                "flops_ratio": ideal,
                "allowed": max(AT_MOST, OVER_IDEAL * ideal) if way == "sadm" else "",
            }
        )
    return rows


def table(rows: list[Row], markdown: bool) -> str:
    head = ["precision", "ZeRO", "stem", "compiled", "iteration", "ms (p20-p80)", "/ plain", "by FLOPs", "at most"]
    lines = [
        [
            *(str(row[column]) for column in ("precision", "zero_stage", "stem", "compiled", "iteration")),
            f"{row['median_ms']:.0f} ({row['p20_ms']:.0f}-{row['p80_ms']:.0f})",
            *(f"{row[column]:.2f}" for column in ("ratio_to_plain", "flops_ratio")),
            "" if row["allowed"] == "" else f"{row['allowed']:.2f}",
        ]
        for row in rows
    ]
    return aligned([head, *lines], markdown)


def cases(arguments: argparse.Namespace) -> Iterator[Case]:
    for case in itertools.product(arguments.precisions, arguments.stages, arguments.stems):
        yield Case(*case, arguments.compile, arguments.micro_batch)


def environment_of_training(threads: int, device: torch.device) -> dict[str, Any]:
    """Describe machine and versions: a time of a training step means nothing without them."""
    common = environment(device.type, threads)
    del common["triton"]
    return common | {"deepspeed": metadata.version("deepspeed")}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    add("--stages", nargs="+", type=int, choices=(0, 1, 2, 3), default=[0, 2], metavar="N", help="of ZeRO")
    add("--stems", nargs="+", choices=("imagenet", "small"), default=["imagenet", "small"], help="of ResNet-18")
    add("--compile", action="store_true", help="torch.compile, all but the reference")
    add("--micro-batch", type=int, default=32, metavar="B")
    add("--threads", type=int, default=2, help="CPU threads (default %(default)s)")
    add("--repeats", type=int, default=7, help="rounds in which each iteration runs once (default %(default)s)")
    add("--markdown", action="store_true", help="print the table as Markdown")
    add("--out", type=Path, default=Path("runs/game_cost"), help="folder of the CSV (%(default)s)")
    arguments = parser.parse_args(argv)
    for name, least in (("micro_batch", 2), ("threads", 1), ("repeats", 1)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name.replace('_', '-')} {getattr(arguments, name)}: must be at least {least}")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    measure.use_threads(arguments.threads)
    rows: list[Row] = []
    arguments.out.mkdir(parents=True, exist_ok=True)
    with distributed() as place, (arguments.out / "game_cost.csv").open("w", newline="") as file:
        common = environment_of_training(arguments.threads, place.device)
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for case in track(list(cases(arguments)), "cost of the game", console=Console(stderr=True)):
            measured = [row | common for row in measure_case(case, arguments.repeats, place.device)]
            writer.writerows(measured)
            file.flush()  # a benchmark that is stopped keeps its rows so far
            rows += measured
    print(f"{common['machine']}, {common['device']}, {common['threads']} threads")
    print(f"torch {common['torch']}, DeepSpeed {common['deepspeed']}, commit {common['commit']}, {common['date'][:10]}")
    print(f"micro-batch {arguments.micro_batch}, median of {arguments.repeats} interleaved repeats\n")
    print(table(rows, arguments.markdown))
    return 0


if __name__ == "__main__":
    sys.exit(main())
