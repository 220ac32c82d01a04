"""How many images a second does each loader deliver? Prints a table, writes CSV and a picture.

    python benchmarks/data_loading.py --micro-batches 32 128 --out runs/data_loading

This project's DALI and torch loaders beside the recipe of DiT's training script (dit_recipe.py), with equally many
threads or worker processes, on photographs of ImageNet's usual size and on the small PNGs of the demo set. All deliver
the same float images of three channels. They take turns within each round, and ratios are taken within a round. Files
are in the page cache: decoding is measured, not the disk.
"""

import argparse
import csv
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import track

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import dit_recipe, image_sets, measure  # noqa: E402
from benchmarks.report import Row, aligned  # noqa: E402
from benchmarks.structure_loss import environment  # noqa: E402
from sadm_fast.data import LoaderSpec, MicroBatchPlan, make_loader, open_images  # noqa: E402
from sadm_fast.data.source import ImageSource  # noqa: E402
from sadm_fast.data.throughput import Closable, Throughput  # noqa: E402
from sadm_fast.data.throughput import measure as measure_throughput  # noqa: E402

PEER = "dit_recipe"
LOADERS = ("dali", "torch", PEER)
COLUMNS = (
    *("commit", "date", "machine", "threads", "torch", "dali", "pillow", "device"),
    *("data", "resolution", "micro_batch", "loader", "images_per_s", "slowest", "fastest", "ratio_to_dit_recipe"),
)
OWN_SIZE = 28  # pixels a side of a digit


class Case(NamedTuple):
    """One problem: the images, and their crop."""

    data: str  # "photographs" or "digits"
    resolution: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.data} {self.resolution} px, {self.micro_batch} a batch"


def factories(root: Path, source: ImageSource, case: Case, threads: int) -> dict[str, Callable[[], Closable]]:
    """Return a function for each loader that makes it."""

    def ours(loader: str) -> Callable[[], Closable]:
        plan = MicroBatchPlan(num_images=len(source), seed=0, flip=True, micro_batch=case.micro_batch)
        spec = LoaderSpec(case.resolution, channels=3, enlarge=True, loader=loader, threads=threads)
        return lambda: make_loader(source, plan, spec)

    def peer() -> Closable:
        return dit_recipe.batches(root, size=case.resolution, micro_batch=case.micro_batch, workers=threads)

    return {loader: peer if loader == PEER else ours(loader) for loader in LOADERS}


def environment_of_data(threads: int) -> Row:
    """Describe machine and versions: a throughput means nothing without them."""
    common = environment("cpu", threads)
    del common["triton"]
    dali = next(
        (f"{found.metadata['Name']} {found.version}" for found in metadata.distributions() if _is_dali(found)), "none"
    )
    return common | {"dali": dali, "pillow": metadata.version("pillow")}


def _is_dali(distribution: metadata.Distribution) -> bool:
    return str(distribution.metadata["Name"]).startswith("nvidia-dali")


def rows_of(case: Case, measured: list[Throughput]) -> list[Row]:
    peer = next(found for found in measured if found.name == PEER)
    return [
        {
            **case._asdict(),
            "loader": found.name,
            "images_per_s": found.median,
            "slowest": found.spread[0],
            "fastest": found.spread[1],
            "ratio_to_dit_recipe": float(np.median(np.divide(found.rounds, peer.rounds))),
        }
        for found in measured
    ]


def table(rows: list[Row], markdown: bool) -> str:
    head = ["data", "pixels", "micro-batch", "loader", "images/s (slowest-fastest)", "/ DiT recipe"]
    lines = [
        [
            *(str(row[column]) for column in ("data", "resolution", "micro_batch", "loader")),
            f"{row['images_per_s']:.0f} ({row['slowest']:.0f}-{row['fastest']:.0f})",
            f"{row['ratio_to_dit_recipe']:.2f}",
        ]
        for row in rows
    ]
    return aligned([head, *lines], markdown)


def picture(rows: list[Row], title: str, path: Path) -> None:
    """Draw images a second as bars, a panel for each data set and resolution; whiskers: slowest to fastest round."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((row["data"], row["resolution"]) for row in rows))
    figure = Figure(figsize=(max(6, 2 + 2.6 * len(panels)), 4), layout="constrained")
    for axes, (data, resolution) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        found = [row for row in rows if (row["data"], row["resolution"]) == (data, resolution)]
        sizes = list(dict.fromkeys(row["micro_batch"] for row in found))
        for i, loader in enumerate(LOADERS):
            bars = [row for row in found if row["loader"] == loader]
            low, middle, high = (np.array([row[c] for row in bars]) for c in ("slowest", "images_per_s", "fastest"))
            places = np.arange(len(bars)) + (i - 1) * 0.27
            axes.bar(places, middle, 0.25, yerr=[middle - low, high - middle], label=loader, capsize=2)
        axes.set_xticks(np.arange(len(sizes)), [str(size) for size in sizes])
        axes.set_title(f"{data}, {resolution} px", fontsize=10)
        axes.grid(axis="y", alpha=0.3)
    figure.axes[0].legend(fontsize=8, frameon=False)
    figure.supxlabel("micro-batch")
    figure.supylabel("images / s")
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=150)


def cases(arguments: argparse.Namespace) -> list[Case]:
    return [
        Case(data, resolution, micro_batch)
        for data, resolutions in (("photographs", arguments.resolutions), ("digits", [OWN_SIZE]))
        for resolution in resolutions
        for micro_batch in arguments.micro_batches
        if data in arguments.data
    ]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", nargs="+", choices=("photographs", "digits"), default=["photographs", "digits"])
    add("--resolutions", nargs="+", type=int, default=[64, 256, 512], metavar="S", help="crops of the photographs")
    add("--micro-batches", nargs="+", type=int, default=[32, 128], metavar="B")
    add("--threads", type=int, default=2, help="DALI's threads, or worker processes (default %(default)s)")
    add("--rounds", type=int, default=5, help="rounds in which each loader runs once (default %(default)s)")
    add("--images", type=int, default=2048, help="images a loader delivers in a round (default %(default)s)")
    add("--photographs", type=Path, default=ROOT / "build/photographs", metavar="DIR", help="written if not there")
    add("--markdown", action="store_true", help="print the table as Markdown")
    add("--out", type=Path, default=Path("runs/data_loading"), help="folder of the CSV and PNG (%(default)s)")
    arguments = parser.parse_args(argv)
    for name in ("resolutions", "micro_batches", "threads", "rounds", "images"):
        value = getattr(arguments, name)
        if min(value if isinstance(value, list) else [value]) < 1:
            parser.error(f"--{name.replace('_', '-')} {value}: must be at least 1")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    measure.use_threads(arguments.threads)
    common = environment_of_data(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    roots: dict[str, Callable[[], Path]] = {
        "photographs": lambda: image_sets.photographs(arguments.photographs),
        "digits": image_sets.digits,
    }
    sources: dict[str, tuple[Path, ImageSource]] = {}
    rows: list[Row] = []
    with (arguments.out / "data_loading.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for case in track(cases(arguments), "data loading", console=Console(stderr=True)):
            if case.data not in sources:
                root = roots[case.data]()
                sources[case.data] = root, open_images(root)
            measured = measure_throughput(
                factories(*sources[case.data], case, arguments.threads),
                micro_batch=case.micro_batch,
                warmup=4,  # as many micro-batches as the deepest queue holds
                batches=-(-arguments.images // case.micro_batch),
                rounds=arguments.rounds,
            )
            found: list[dict[str, Any]] = [common | row for row in rows_of(case, measured)]
            writer.writerows(found)
            file.flush()  # a benchmark that is stopped keeps its rows so far
            rows += found
    where = f"{common['machine']}, {common['threads']} threads"
    versions = f"torch {common['torch']}, {common['dali']}, Pillow {common['pillow']}"
    when = f"commit {common['commit']}, {common['date'][:10]}"
    picture(rows, f"images a second\n{where}\n{versions}, {when}", arguments.out / "data_loading.png")
    print(f"{where}\n{versions}, {when}\nmedian of {arguments.rounds} interleaved rounds\n")
    print(table(rows, arguments.markdown))
    return 0


if __name__ == "__main__":
    sys.exit(main())
