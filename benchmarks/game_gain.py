"""Does the game pay off? Train the same configuration in several modes and seeds, and print the table.

    python benchmarks/game_gain.py --config configs/mnist.json --modes plain structure sadm --seeds 0 1 2

Runs of one seed share data order, noise, starting noise of the samples, and the judge, so their ratio is paired.
Finished runs are not repeated; interrupted ones continue.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def train(config: Path, mode: str, seed: int, folder: Path, overrides: list[str]) -> dict[int, dict[str, Any]]:
    """Run one training to its end, and return the lines of its evaluations.jsonl by step."""
    command = [sys.executable, str(ROOT / "sadm_fast" / "train.py"), "--config", str(config), "--run-dir", str(folder)]
    for override in [f"name={mode}{seed}", f"seed={seed}", f"game.mode={mode}", *overrides]:
        command += ["--set", override]
    subprocess.run(command, check=True)
    lines = (folder / "evaluations.jsonl").read_text().splitlines()
    return {line["step"]: line for line in map(json.loads, lines)}


def table(scores: dict[str, dict[int, dict[int, dict[str, Any]]]]) -> str:
    """Markdown: for each step and feature space the mean of the first mode, and the change of the others against it."""
    modes = list(scores)
    base, others = modes[0], modes[1:]
    head = ["step", "distance", base, *(f"{mode} against {base}: mean (each seed)" for mode in others)]
    rows = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    evaluations = next(iter(scores[base].values()))
    for step in sorted(evaluations):
        for space in evaluations[step]["floor"]:
            values = [run[step][space] for run in scores[base].values()]
            cells = [str(step), space, f"{statistics.mean(values):.4g} ({min(values):.4g} to {max(values):.4g})"]
            for mode in others:
                changes = [run[step][space] / scores[base][s][step][space] - 1 for s, run in scores[mode].items()]
                each = ", ".join(f"{change:+.1%}" for change in changes)
                cells.append(f"{statistics.mean(changes):+.1%} ({each})")
            rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "mnist.json")
    parser.add_argument("--modes", nargs="+", default=["plain", "structure", "sadm"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/gain"))
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    scores: dict[str, dict[int, dict[int, dict[str, Any]]]] = {mode: {} for mode in arguments.modes}
    for seed in arguments.seeds:
        for mode in arguments.modes:
            folder = arguments.out / f"{mode}{seed}"
            scores[mode][seed] = train(arguments.config, mode, seed, folder, arguments.overrides)
    print(table(scores))
    return 0


if __name__ == "__main__":
    sys.exit(main())
