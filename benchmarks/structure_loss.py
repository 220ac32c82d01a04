"""How fast, how exact and how small in memory is the fused structure loss? Prints a table, writes CSV and a picture.

    python benchmarks/structure_loss.py --sizes 64 256 1024 4096 8192 --dims 128 512 --out runs/structure_loss

Each provider has a line, forward and backward on the same features: the fused loss (native on the CPU, triton on a
GPU); the loss as others would write it (gram and cdist: eager PyTorch; compile: torch.compile of the reference; keops:
pykeops); and gemm_floor, the matrix products alone, which no implementation can avoid. They take turns within each
repeat, and ratios are taken within a repeat: below 1 is faster. A provider that cannot run is named with the reason.
"""

import argparse
import csv
import itertools
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import measure, peers  # noqa: E402
from benchmarks.peers import FLOOR, Case, Unavailable  # noqa: E402
from benchmarks.report import MEANS, Row, picture, table  # noqa: E402
from sadm_fast.planning.gpus import of_device  # noqa: E402
from sadm_kernels import structure_loss  # noqa: E402
from sadm_kernels.reference import NORMALIZATIONS, PENALTIES, RELATIONS  # noqa: E402

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DENSE_MATRICES = 20  # float32 B x B matrices that eager code holds at its peak (12 to 18 were measured), rounded up
COLUMNS = (
    *("commit", "date", "machine", "threads", "torch", "triton", "device"),
    *("B", "d", "dtype", "relation", "penalty", "normalize", "grads", "provider"),
    *("median_ms", "p20_ms", "p80_ms", "ratio_to_best_peer", "ratio_to_floor", "peak_extra_mb"),
    *(f"{what}_error_mean{mean}" for what in ("loss", "grad") for mean in MEANS),
    "roofline_share",
)


def machine(device: str) -> str:
    """Name the GPU, or the CPU's model and the instruction set that torch uses."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model} ({torch.backends.cpu.get_cpu_capability()})"


def environment(device: str, threads: int) -> Row:
    """Describe machine and versions: a time means nothing without them."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--exclude=*", "--dirty=+dirty"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    return {
        "commit": commit or "unknown",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(device),
        "threads": threads,
        "torch": torch.__version__,
        "triton": triton,
        "device": device,
    }


@contextmanager
def left_out_if_it_fails(name: str) -> Iterator[None]:
    """Make any error of a peer Unavailable, for the others count without it. Our own failures end the benchmark."""
    try:
        yield
    except Unavailable:
        raise
    except Exception as error:
        if name in peers.OURS:
            raise
        raise Unavailable(f"fails here: {type(error).__name__}: {' '.join(str(error).split())[:200]}") from error


def admit(name: str, case: Case, repeats: int, limit: float) -> peers.Loss:
    """Return the provider's loss after a first call; Unavailable if it cannot run, or needs too much memory or time."""
    needed, free = DENSE_MATRICES * 4 * case.batch**2, measure.available_bytes(case.device)
    if name in peers.DENSE and needed > free:
        raise Unavailable(f"may take {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free")
    with left_out_if_it_fails(name):
        loss = peers.loss_of(name, case)
        call = measure.forward_backward(loss, case)
        first = measure.seconds(call, 1, case.device)  # includes compilation
        if first > limit:
            raise Unavailable(f"the first call took {first:.1f} s, over --time-limit {limit:g}")
        total = repeats * measure.seconds(call, 1, case.device)
        if total > limit:
            raise Unavailable(f"{repeats} repeats would take {total:.1f} s, over --time-limit {limit:g}")
    return loss


def errors(loss: peers.Loss, case: Case) -> Row:
    """Measure relative errors against the reference in float64: of the loss, and of all gradients in the 2-norm."""
    found = {}
    for mean in MEANS:
        real, fake = case.features(mean)
        exact = [x.detach().double().requires_grad_(x.requires_grad) for x in (real, fake)]
        want, want_grads = peers.value_and_gradients(
            lambda f, g: structure_loss(f, g, **case.options, impl="reference"), exact[0], exact[1]
        )
        got, got_grads = peers.value_and_gradients(loss, real, fake)
        grads = torch.stack(want_grads)
        found[f"loss_error_mean{mean}"] = float(((got - want) / want).detach().abs())
        found[f"grad_error_mean{mean}"] = float((torch.stack(got_grads) - grads).norm() / grads.norm())
    return found


def roofline_share(case: Case, seconds: float) -> float | str:
    """Return the share of the GPU's peak that the least products reach in this time; "" if the peak is not known."""
    if case.device == "cpu":
        return ""
    gpu = of_device(torch.cuda.get_device_name())
    if gpu is None:
        return ""
    # float32 products that are exact to float32 are three of tf32 each (tf32x3).
    peak = gpu.tf32 / 3 if case.dtype == torch.float32 else gpu.bf16
    return case.flops / seconds / peak


def measure_case(case: Case, arguments: argparse.Namespace) -> tuple[list[Row], dict[str, str]]:
    """Time one problem: a row for each provider that can run it, and the reasons of the others."""
    losses: dict[str, peers.Loss] = {}
    left_out: dict[str, str] = {}
    for name in arguments.providers:
        try:
            losses[name] = admit(name, case, arguments.repeats, arguments.time_limit)
        except Unavailable as reason:
            left_out[name] = str(reason)
    calls: dict[str, measure.Call] = {name: measure.forward_backward(loss, case) for name, loss in losses.items()}
    calls[FLOOR] = peers.GemmFloor(case, *case.features())
    calls[FLOOR]()
    samples = measure.interleaved(calls, arguments.repeats, case.device)
    measured = {name: measure.spread(times) for name, times in samples.items()}
    best_peer = min((name for name in peers.PEERS if name in losses), key=lambda name: measured[name][1], default=None)
    rows = []
    for name, (low, middle, high) in measured.items():
        row: Row = dict.fromkeys(COLUMNS, "")
        row |= {
            "B": case.batch,
            "d": case.dim,
            "dtype": case.dtype_name,
            "grads": case.grads,
            **case.options,
            "provider": name,
        }
        row |= {"median_ms": 1e3 * middle, "p20_ms": 1e3 * low, "p80_ms": 1e3 * high}
        row["ratio_to_floor"] = measure.ratio(samples[name], samples[FLOOR])
        row["roofline_share"] = roofline_share(case, middle)
        if best_peer is not None:
            row["ratio_to_best_peer"] = measure.ratio(samples[name], samples[best_peer])
        if name != FLOOR:
            try:
                with left_out_if_it_fails(name):
                    peak = measure.peak_extra_mb(name, case, arguments.threads)
                    row["peak_extra_mb"] = "" if peak is None else peak
                    if case.batch <= arguments.error_size:
                        row |= errors(losses[name], case)
            except Unavailable as reason:  # its times stand
                left_out[f"memory and errors of {name}"] = str(reason)
        rows.append(row)
    return rows, left_out


def cases(arguments: argparse.Namespace) -> Iterator[Case]:
    """Yield all combinations that were asked for, small ones first."""
    for size, dim, dtype, grads in itertools.product(
        sorted(arguments.sizes), arguments.dims, arguments.dtypes, ("fake", "both")
    ):
        options = {name: getattr(arguments, name) for name in ("relation", "penalty", "normalize", "device")}
        yield Case(size, dim, DTYPES[dtype], grads, **options)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--sizes", nargs="+", type=int, default=[64, 256, 1024, 4096, 8192], metavar="B", help="batch sizes")
    add("--dims", nargs="+", type=int, default=[128, 512], metavar="D", help="feature widths")
    add("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"], help="of the features")
    add("--relation", choices=RELATIONS, default="euclidean")
    add("--penalty", choices=PENALTIES, default="squared")
    add("--normalize", choices=NORMALIZATIONS, default="unit")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--threads", type=int, default=2, help="CPU threads (default %(default)s)")
    add("--providers", nargs="+", choices=peers.PROVIDERS, help="default: the device's fused loss, and all peers")
    add("--repeats", type=int, default=11, help="rounds in which each provider runs once (default %(default)s)")
    add("--time-limit", type=float, default=300.0, metavar="SECONDS", help="for one provider and case (%(default)s)")
    add("--error-size", type=int, default=1024, metavar="B", help="errors up to this B (%(default)s): float64 is slow")
    add("--markdown", action="store_true", help="print the table as Markdown")
    add("--out", type=Path, default=Path("runs/structure_loss"), help="folder of the CSV and PNG (%(default)s)")
    arguments = parser.parse_args(argv)
    for name, least in (("sizes", 2), ("dims", 1), ("threads", 1), ("repeats", 1)):
        value = getattr(arguments, name)
        if min(value if isinstance(value, list) else [value]) < least:
            parser.error(f"--{name} {value}: must be at least {least}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    arguments.providers = arguments.providers or ["native" if arguments.device == "cpu" else "triton", *peers.PEERS]
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    measure.use_threads(arguments.threads)
    common = environment(arguments.device, arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    missing: dict[tuple[str, str], list[Case]] = {}
    with (arguments.out / "structure_loss.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for case in track(list(cases(arguments)), "structure loss", console=Console(stderr=True)):
            measured, left_out = measure_case(case, arguments)
            measured = [row | common for row in measured]
            writer.writerows(measured)
            file.flush()  # a benchmark that is stopped keeps its rows so far
            rows += measured
            for why in left_out.items():
                missing.setdefault(why, []).append(case)
    where = f"{common['machine']}, {common['device']}, {common['threads']} threads"
    versions = f"torch {common['torch']}, triton {common['triton']}, commit {common['commit']}, {common['date'][:10]}"
    what = f"{arguments.relation}, {arguments.penalty}, {arguments.normalize}; forward + backward"
    picture(rows, f"structure loss: {what}\n{where}\n{versions}", arguments.out / "structure_loss.png")
    print(f"{where}, {versions}\n{what}, median of {arguments.repeats} interleaved repeats\n")
    print(table(rows, arguments.markdown), end="\n\n")
    if max(arguments.sizes) > arguments.error_size:
        print(f"Errors, relative to float64, are measured up to B = {arguments.error_size}.")
    for (name, reason), absent in missing.items():
        print(f"Left out: {name} at {', '.join(map(str, absent))}: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
