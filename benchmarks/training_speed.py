"""Images a second of each way to train, beside a tuned peer; in turns, in one process.

    python benchmarks/training_speed.py [--ways plain structure sadm peer --compile on graphs --json FILE ...]

plain, structure and sadm are whole steps as the trainer runs them: draw, both players' turns, averages; bf16, ZeRO-1,
one rank. peer is tuned_peer.py. A way of training is measured once for each value of --compile. MFU counts products and
convolutions (planning.speed) against the device's dense peak. The first step has all that it compiles; memory is the
peak of a way's tensors.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import measure, tuned_peer  # noqa: E402
from benchmarks.game_cost import environment_of_training  # noqa: E402
from benchmarks.latent_game import CLASSES, game_config, made_up_players, steady_iteration  # noqa: E402
from benchmarks.report import Row, aligned  # noqa: E402
from sadm_fast.planning.speed import StepSpeed  # noqa: E402
from sadm_fast.ranks.launch import distributed  # noqa: E402

WAYS = ("plain", "structure", "sadm", "peer")
WARMUP = 4  # after the first step; allocates, settles the first iteration, lets the clocks rise
SMALL = {"hidden_size": 192, "depth": 4, "num_heads": 3, "patch_size": 4, "num_classes": CLASSES}


class Way:
    """One way to train, ready to be timed."""

    def __init__(self, way: str, compilation: str, arguments: argparse.Namespace, device: torch.device) -> None:
        self.name = way if way == "peer" else f"{way}, {compilation}"
        self.device, self.micro_batch = device, arguments.micro_batch
        denoiser = SMALL if arguments.model == "small" else {"name": arguments.model, "num_classes": CLASSES}
        config = game_config(
            "plain" if way == "peer" else way,
            micro_batch=arguments.micro_batch,
            denoiser=denoiser,
            train={"precision": "bf16", "compile": "on" if way == "peer" else compilation},
            zero_optimization={"stage": 1},
        )
        before = self._allocated()
        if way == "peer":
            self.step = tuned_peer.iteration(config, device)
        else:
            self.step = steady_iteration(config, made_up_players(config, device))
        self.speed = StepSpeed.of(config, CLASSES, device)
        start = time.perf_counter()
        self.finished(1)
        self.first = time.perf_counter() - start
        self.finished(WARMUP)
        self.memory = self._allocated(peak=True) - before

    def finished(self, steps: int) -> float:
        """Take steps, wait for the last; return seconds a step."""
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / steps

    def _allocated(self, *, peak: bool = False) -> int:
        """Bytes of a GPU's tensors, of all ways so far; the peak is that since the call without it."""
        if self.device.type != "cuda":
            return 0
        if peak:
            return torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def row(self, samples: list[float], others: list[float]) -> Row:
        low, middle, high = measure.spread(samples)
        return {
            "way": self.name,
            "median_ms": 1e3 * middle,
            "p20_ms": 1e3 * low,
            "p80_ms": 1e3 * high,
            "images_per_s": self.micro_batch / middle,
            "mfu": self.speed.achieved(1 / middle, playing=True)["mfu"],
            "ratio_to_first_way": measure.ratio(samples, others),
            "first_s": self.first,
            "peak_gib": self.memory / 2**30,
        }


def profiled(way: Way, steps: int = 3) -> str:
    """Kernels of a few steps by name and the host's operations, in milliseconds of all steps."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (way.device.type == "cuda")
    with profile(activities=activities) as profiler:
        way.finished(steps)
    by = "self_cuda_time_total" if way.device.type == "cuda" else "self_cpu_time_total"
    averages = profiler.key_averages()
    tables = [
        averages.table(sort_by=key, row_limit=45, max_name_column_width=90) for key in (by, "self_cpu_time_total")
    ]
    return f"== {way.name}: {steps} steps\n" + "\n".join(tables)


def table(rows: list[Row], markdown: bool) -> str:
    head = ["way", "ms (p20-p80)", "images/s", "MFU", f"/ {rows[0]['way']}", "first step, s", "peak, GiB"]
    lines = [
        [
            row["way"],
            f"{row['median_ms']:.1f} ({row['p20_ms']:.1f}-{row['p80_ms']:.1f})",
            f"{row['images_per_s']:.1f}",
            "" if row["mfu"] is None else f"{row['mfu']:.1%}",
            f"{row['ratio_to_first_way']:.3f}",
            f"{row['first_s']:.1f}",
            f"{row['peak_gib']:.1f}",
        ]
        for row in rows
    ]
    return aligned([head, *lines], markdown)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    gpu = torch.cuda.is_available()
    add("--ways", nargs="+", choices=WAYS, default=["plain", "sadm", "peer"])
    add("--compile", nargs="+", choices=("off", "on", "graphs"), default=["on"], help="train.compile of our ways")
    add("--model", default="DiT-XL/2" if gpu else "small", help="a DiT's name, or small (default %(default)s)")
    add("--micro-batch", type=int, default=64 if gpu else 16, metavar="B")
    add("--rounds", type=int, default=4, help="in each, every way takes --steps steps (default %(default)s)")
    add("--steps", type=int, default=5, help="steps of a way in a row (default %(default)s)")
    add("--threads", type=int, default=8 if gpu else 2, help="CPU threads (default %(default)s)")
    add("--json", type=Path, metavar="FILE", help="also write rows and machine as JSON")
    add("--profile", type=Path, metavar="FILE", help="also write kernels and operations of three steps of each way")
    add("--markdown", action="store_true", help="print the table as Markdown")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    measure.use_threads(arguments.threads)
    wanted = [(way, how) for way in arguments.ways for how in (["on"] if way == "peer" else arguments.compile)]
    with distributed() as place:
        common: dict[str, Any] = environment_of_training(arguments.threads, place.device)
        ways = []
        for way, how in wanted:
            ways.append(Way(way, how, arguments, place.device))
            print(f"{ways[-1].name}: first step {ways[-1].first:.1f} s", file=sys.stderr, flush=True)
        samples: dict[str, list[float]] = {way.name: [] for way in ways}
        for turn in range(arguments.rounds):
            for way in ways[turn % len(ways) :] + ways[: turn % len(ways)]:
                samples[way.name].append(way.finished(arguments.steps))
        rows = [way.row(samples[way.name], samples[ways[0].name]) for way in ways]
        print(f"{common['machine']}, {common['device']}, {common['threads']} threads, torch {common['torch']},")
        print(f"DeepSpeed {common['deepspeed']}, commit {common['commit']}, {common['date'][:10]}; {arguments.model},")
        print(f"micro-batch {arguments.micro_batch}, {arguments.rounds} rounds of {arguments.steps} steps in turns\n")
        print(table(rows, arguments.markdown), flush=True)
        if arguments.json is not None:
            arguments.json.write_text(json.dumps({**common, "rows": rows, "seconds": samples}, indent=1) + "\n")
        if arguments.profile is not None:
            arguments.profile.write_text("\n".join(map(profiled, ways)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
