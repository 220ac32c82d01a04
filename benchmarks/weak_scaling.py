"""How much does a second rank slow down the first? Two ranks of one core each beside one; prints a table, writes CSV.

    python benchmarks/weak_scaling.py --precisions fp32 bf16 --stages 2 --out runs/weak_scaling

One iteration of the game (DiT-S/4 on 32x32x4 latents, ResNet-18 as Psi, the same micro-batch on each rank), each
process pinned to a core of its own. All processes live through the measurement and wait, blocked, for their turn:

    alone       one rank, while the others wait
    unconnected two such ranks at once, which do not talk: the cost of shared memory and caches
    together    two ranks of one job: that cost, and communication

Efficiency is the time alone over the time together, within a round; unconnected over together is the part that
communication costs.
"""

import argparse
import csv
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import track
from torch.distributed import TCPStore

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import measure  # noqa: E402
from benchmarks.latent_game import game_config, iteration  # noqa: E402
from benchmarks.report import Row, aligned  # noqa: E402
from benchmarks.structure_loss import environment  # noqa: E402
from sadm_fast.ranks.launch import distributed  # noqa: E402

WAYS = ("alone", "unconnected", "together")
COLUMNS = (
    *("commit", "date", "machine", "threads", "torch", "device"),
    *("precision", "zero_stage", "overlap_comm", "bucket", "stem", "micro_batch", "way"),
    *("median_ms", "p20_ms", "p80_ms", "efficiency"),
)
TARGET = 0.85


class Job:
    """The ranks of one job, each on a core of its own; they play an iteration when told to."""

    def __init__(self, cores: list[int], arguments: list[str]) -> None:
        base = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        base |= {"OMP_NUM_THREADS": "1"}
        self._store = None
        if len(cores) > 1:  # held here, so that nobody can take its port in between
            self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            base |= {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(self._store.port),
                "WORLD_SIZE": str(len(cores)),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
            }
        self._ranks = []
        for rank, core in enumerate(cores):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if len(cores) > 1 else {}
            command = [sys.executable, __file__, "--worker", str(core), *arguments]
            self._ranks.append(
                subprocess.Popen(
                    command,
                    env=base | place,
                    text=True,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                )  # fmt: skip
            )

    def start(self) -> None:
        """Tell every rank to play one iteration."""
        for rank in self._ranks:
            assert rank.stdin is not None
            rank.stdin.write("\n")
            rank.stdin.flush()

    def seconds(self) -> float:
        """Return the seconds of the slowest rank for it."""
        answers = []
        for rank in self._ranks:
            assert rank.stdout is not None
            line = rank.stdout.readline()
            if not line:
                raise RuntimeError(f"a rank has ended with code {rank.wait()}; run it by hand: {rank.args}")
            answers.append(float(line))
        return max(answers)

    def close(self) -> None:
        for rank in self._ranks:
            rank.kill()
            rank.wait()


@contextmanager
def jobs(arguments: list[str]) -> Iterator[dict[str, list[Job]]]:
    """Start the jobs of each way, and let them play two iterations to warm up."""
    first, second = sorted(os.sched_getaffinity(0))[:2]
    solos, pair = [Job([first], arguments), Job([second], arguments)], Job([first, second], arguments)
    ways = {"alone": solos[:1], "unconnected": solos, "together": [pair]}
    try:
        for _ in range(2):
            for way in WAYS:
                _turn(ways[way])
        yield ways
    finally:
        for job in [*solos, pair]:
            job.close()


def _turn(playing: list[Job]) -> float:
    for job in playing:
        job.start()
    return max(job.seconds() for job in playing)


def measure_case(arguments: argparse.Namespace, precision: str, stage: int) -> list[Row]:
    """Time one setup: a row for each way."""
    settings = ["--precisions", precision, "--stages", str(stage), "--stem", arguments.stem]
    settings += ["--micro-batch", str(arguments.micro_batch), "--bucket", str(arguments.bucket)]
    settings += ["--overlap-comm"] if arguments.overlap_comm else []
    samples: dict[str, list[float]] = {way: [] for way in WAYS}
    with jobs(settings) as ways:
        for repeat in range(arguments.repeats):
            for way in WAYS[repeat % len(WAYS) :] + WAYS[: repeat % len(WAYS)]:
                samples[way].append(_turn(ways[way]))
    rows: list[Row] = []
    for way, times in samples.items():
        low, middle, high = measure.spread(times)
        rows.append(
            {
                "precision": precision,
                "zero_stage": stage,
                "overlap_comm": arguments.overlap_comm,
                "bucket": arguments.bucket,
                "stem": arguments.stem,
                "micro_batch": arguments.micro_batch,
                "way": way,
                "median_ms": 1e3 * middle,
                "p20_ms": 1e3 * low,
                "p80_ms": 1e3 * high,
                "efficiency": measure.ratio(samples["alone"], times),
            }
        )
    return rows


def work(arguments: argparse.Namespace) -> None:
    """Be one rank: play an iteration for each line on stdin, and print its seconds."""
    os.sched_setaffinity(0, {arguments.worker})
    measure.use_threads(1)
    config = game_config(
        micro_batch=arguments.micro_batch,
        structure_encoder={"stem": arguments.stem},
        train={"precision": arguments.precisions[0]},
        zero_optimization={
            "stage": arguments.stages[0],
            "overlap_comm": arguments.overlap_comm,
            "reduce_bucket_size": arguments.bucket,
            "allgather_bucket_size": arguments.bucket,
        },
    )
    with distributed() as place:
        play = iteration(config, place.device, place.rank)
        for _ in sys.stdin:
            start = time.perf_counter()
            play()
            print(time.perf_counter() - start, flush=True)


def table(rows: list[Row], markdown: bool) -> str:
    head = ["precision", "ZeRO", "micro-batch", "way", "ms (p20-p80)", f"efficiency (target {TARGET})"]
    lines = [
        [
            *(str(row[column]) for column in ("precision", "zero_stage", "micro_batch", "way")),
            f"{row['median_ms']:.0f} ({row['p20_ms']:.0f}-{row['p80_ms']:.0f})",
            f"{row['efficiency']:.3f}",
        ]
        for row in rows
    ]
    return aligned([head, *lines], markdown)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    add("--stages", nargs="+", type=int, choices=(0, 1, 2, 3), default=[2], metavar="N", help="of ZeRO")
    add("--stem", choices=("imagenet", "small"), default="imagenet", help="of ResNet-18 (default %(default)s)")
    add("--micro-batch", type=int, default=32, metavar="B", help="of each rank (default %(default)s)")
    add("--bucket", type=int, default=2_000_000, metavar="N", help="elements that travel at once (%(default)s)")
    add("--overlap-comm", action="store_true")
    add("--repeats", type=int, default=7, help="rounds in which each way runs once (default %(default)s)")
    add("--markdown", action="store_true", help="print the table as Markdown")
    add("--out", type=Path, default=Path("runs/weak_scaling"), help="folder of the CSV (%(default)s)")
    add("--worker", type=int, metavar="CORE", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    for name, least in (("micro_batch", 2), ("bucket", 1), ("repeats", 1)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name.replace('_', '-')} {getattr(arguments, name)}: must be at least {least}")
    if len(os.sched_getaffinity(0)) < 2 and arguments.worker is None:
        parser.error("two cores are needed")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments.worker is not None:
        work(arguments)
        return 0
    common = environment("cpu", 1)
    del common["triton"]
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    with (arguments.out / "weak_scaling.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        cases = list(itertools.product(arguments.precisions, arguments.stages))
        for precision, stage in track(cases, "weak scaling", console=Console(stderr=True)):
            measured = [row | common for row in measure_case(arguments, precision, stage)]
            writer.writerows(measured)
            file.flush()  # a benchmark that is stopped keeps its rows so far
            rows += measured
    print(f"{common['machine']}, a core and a thread a rank, torch {common['torch']}, commit {common['commit']}")
    print(f"median of {arguments.repeats} interleaved rounds, {common['date'][:10]}\n")
    print(table(rows, arguments.markdown))
    return 0


if __name__ == "__main__":
    sys.exit(main())
