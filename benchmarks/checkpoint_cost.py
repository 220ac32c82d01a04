"""What does a checkpoint cost, and how soon does a killed run continue? Prints a table, writes CSV.

    python benchmarks/checkpoint_cost.py --stages 0 2 --out runs/checkpoint_cost

A denoiser of 91 M parameters and ResNet-18 (11 M) as Psi, both training on made-up latents on one rank: masters, both
moments and the denoiser's average are 1.6 GB.

    blocked     how long CheckpointWriter.save stops the training (target: 0.2 s)
    writing     from then until the checkpoint is complete, while training continues
    cost        blocked, plus the time by which steps during the writing are longer than those before
    interval    the shortest time between two checkpoints at which the cost is 5% of it
    resumed     a new `python sadm_fast/train.py` in such a run's folder, from the start of the process to its first
                finished step (target: 10 s)
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import measure  # noqa: E402
from benchmarks.game_cost import environment_of_training  # noqa: E402
from benchmarks.latent_game import CLASSES, game_config, made_up, made_up_players  # noqa: E402
from benchmarks.report import Row, aligned  # noqa: E402
from sadm_fast.ranks.launch import distributed  # noqa: E402

DENOISER: dict[str, Any] = {"patch_size": 4, "hidden_size": 640, "depth": 12, "num_heads": 10}
MAY_COST = 0.05  # share of a checkpoint interval
COLUMNS = (
    *("commit", "date", "machine", "threads", "torch", "deepspeed", "device", "zero_stage", "parameters", "bytes"),
    *("what", "median_s", "p20_s", "p80_s"),
)


def measure_saves(stage: int, saves: int, folder: Path, device: torch.device) -> tuple[dict[str, list[float]], Row]:
    """Time each save: seconds by purpose, and how much was saved."""
    from sadm_fast.build import build_denoiser
    from sadm_fast.ema import EMA
    from sadm_fast.engine.masters import local_masters, trainable_shapes
    from sadm_fast.run.checkpoint_writer import CheckpointWriter
    from sadm_fast.run.manifest import EMA_FILE
    from sadm_fast.run.state import TrainState

    config = game_config(
        micro_batch=2, denoiser={**DENOISER, "num_classes": CLASSES}, zero_optimization={"stage": stage}
    )
    players = made_up_players(config, device)
    shapes = trainable_shapes(build_denoiser(config, CLASSES))
    ema = EMA(lambda: list(local_masters(players.denoiser)), config.train.ema)
    play = partial(players.iteration, [made_up(config, 0)], 0)

    writer = CheckpointWriter(
        folder, players.engines, {EMA_FILE: lambda: ema.average}, shapes, identity={}, keep_last=1, say=print
    )  # fmt: skip

    def step() -> float:
        start = time.perf_counter()
        play()
        ema.update()
        writer.decide(*writer.status())
        return time.perf_counter() - start

    step()
    found: dict[str, list[float]] = {"step": [], "blocked": [], "writing": [], "cost": [], "interval": []}
    for _ in range(saves):
        before = [step() for _ in range(8)]
        usual = measure.spread(before)[1]
        start = time.perf_counter()
        state = TrainState(step=ema.updates, ema_updates=ema.updates)
        writer.save(state)
        blocked = time.perf_counter() - start
        during = []
        while not (folder / f"step-{state.step:06d}" / "COMPLETE").exists():
            during.append(step())
        cost = blocked + sum(during) - len(during) * usual
        found["step"] += before
        found["blocked"].append(blocked)
        found["writing"].append(time.perf_counter() - start - blocked)
        found["cost"].append(cost)
        found["interval"].append(cost / MAY_COST)
        writer.finish()
    writer.close()
    parameters = sum(p.numel() for engine in players.engines.values() for p in engine.module.parameters())
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return found, {"zero_stage": stage, "parameters": parameters, "bytes": size}


def measure_resume(stage: int, times: int, folder: Path) -> list[float]:
    """Time `times` resumed runs: seconds from the start of the process to its first finished step."""
    config = {
        "name": "resume",
        "data": {"path": "demo:mnist5k", "resolution": 28, "channels": 1, "threads": 1},
        "denoiser": DENOISER,
        "structure_encoder": {"architecture": "resnet18", "pretrain": {"steps": 1, "batch": 16}},
        "train": {"steps": 2, "micro_batch": 2, "log_every": 1, "sample_every": 1 << 30, "checkpoint_every": 1 << 30},
        "sampling": {"steps": 1, "columns": 2, "rows": 1},
        "deepspeed": {"zero_optimization": {"stage": stage}},
    }
    file, run = folder / "resume.json", folder / "run"
    file.write_text(json.dumps(config))
    command = [sys.executable, str(ROOT / "sadm_fast/train.py"), "--config", str(file), "--run-dir", str(run)]
    with (folder / "said.txt").open("w") as said:
        subprocess.run(command, check=True, stdout=said, stderr=subprocess.STDOUT)
        metrics = run / "metrics.jsonl"
        found = []
        for _ in range(times):
            kept = [line for line in metrics.read_text().splitlines() if json.loads(line)["step"] <= 2]
            metrics.write_text("".join(line + "\n" for line in kept))  # as it was when the checkpoint was saved
            start = time.perf_counter()
            resumed = [*command, "--set", "train.steps=1000000"]
            with subprocess.Popen(resumed, stdout=said, stderr=subprocess.STDOUT) as process:
                while len(metrics.read_text().splitlines()) == len(kept):
                    if process.poll() is not None:
                        raise RuntimeError(f"the resumed run has ended: {(folder / 'said.txt').read_text()[-1000:]}")
                    time.sleep(0.01)
                found.append(time.perf_counter() - start)
                process.kill()
    return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--stages", nargs="+", type=int, choices=(0, 1, 2), default=[0, 2], metavar="N", help="of ZeRO")
    add("--threads", type=int, default=2, help="CPU threads (default %(default)s)")
    add("--saves", type=int, default=5, help="checkpoints of each stage (default %(default)s)")
    add("--resumes", type=int, default=3, help="restarts at the first stage (default %(default)s)")
    add("--folder", type=Path, help="where to write, for the disk that is meant (default: a temporary one)")
    add("--markdown", action="store_true", help="print the table as Markdown")
    add("--out", type=Path, default=Path("runs/checkpoint_cost"), help="folder of the CSV (%(default)s)")
    arguments = parser.parse_args(argv)
    for name, least in (("threads", 1), ("saves", 1), ("resumes", 0)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name} {getattr(arguments, name)}: must be at least {least}")
    return arguments


def rows_of(found: dict[str, list[float]], common: Row) -> list[Row]:
    rows = []
    for what, times in found.items():
        low, middle, high = measure.spread(times)
        rows.append({**common, "what": what, "median_s": middle, "p20_s": low, "p80_s": high})
    return rows


def table(rows: list[Row], markdown: bool) -> str:
    head = ["ZeRO", "parameters", "GB", "what", "s (p20-p80)"]
    lines = [
        [
            str(row["zero_stage"]),
            f"{row['parameters'] / 1e6:.0f} M",
            f"{row['bytes'] / 1e9:.2f}",
            str(row["what"]),
            f"{row['median_s']:.3g} ({row['p20_s']:.3g}-{row['p80_s']:.3g})",
        ]
        for row in rows
    ]
    return aligned([head, *lines], markdown)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    measure.use_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    with distributed() as place, (arguments.out / "checkpoint_cost.csv").open("w", newline="") as file:
        common = environment_of_training(arguments.threads, place.device)
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for stage in track(arguments.stages, "cost of a checkpoint", console=Console(stderr=True)):
            with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                found, size = measure_saves(stage, arguments.saves, Path(folder), place.device)
            if arguments.resumes and stage == arguments.stages[0]:
                with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                    found["resumed"] = measure_resume(stage, arguments.resumes, Path(folder))
            measured = rows_of(found, common | size)
            writer.writerows(measured)
            file.flush()  # a benchmark that is stopped keeps its rows so far
            rows += measured
    print(f"{common['machine']}, {common['device']}, {common['threads']} threads")
    print(f"torch {common['torch']}, DeepSpeed {common['deepspeed']}, commit {common['commit']}, {common['date'][:10]}")
    print(f"median of {arguments.saves} saves, {arguments.resumes} resumed runs\n")
    print(table(rows, arguments.markdown))
    return 0


if __name__ == "__main__":
    sys.exit(main())
