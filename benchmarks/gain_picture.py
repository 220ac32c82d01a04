"""One picture of what benchmarks/game_gain.py found: each configuration's distance over the baseline's, by step.

    cd docs/evidence; python ../../benchmarks/gain_picture.py digits.csv equal_pull_digits.csv --out digits.png

Reads the scores.csv that game_gain.py writes beside its results; several give a row for each of their sets. Lines are
geometric means over the seeds, bars Student's 95% intervals of the paired ratios.
"""

import argparse
import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.gain_report import SCORE_KEYS, Interval, interval  # noqa: E402
from sadm_fast import cli  # noqa: E402
from sadm_fast.errors import UserError  # noqa: E402

Points = list[tuple[int, Interval]]


class Scores(NamedTuple):
    """Distances by set, configuration, seed, step and space, in the order of the files."""

    distances: dict[tuple[str, str, int, int, str], float]

    @property
    def sets(self) -> list[str]:
        return list(dict.fromkeys(name for name, *_ in self.distances))

    @property
    def configurations(self) -> list[str]:
        return list(dict.fromkeys(configuration for _, configuration, *_ in self.distances))

    @property
    def spaces(self) -> list[str]:
        return list(dict.fromkeys(space for *_, space in self.distances))

    def ratios(self, name: str, configuration: str, baseline: str, space: str) -> Points:
        """At each step, the distance over the baseline's at the same seed: mean and 95% interval over the seeds."""
        found: dict[int, list[float]] = {}
        for (s, c, seed, step, where), distance in self.distances.items():
            plain = self.distances.get((name, baseline, seed, step, space))
            if (s, c, where) == (name, configuration, space) and plain is not None:
                found.setdefault(step, []).append(distance / plain)
        return [(step, interval(ratios)) for step, ratios in sorted(found.items())]


def read(paths: Sequence[Path]) -> Scores:
    """Read the scores of one or more series. Raises UserError: what is not the scores.csv of game_gain.py."""
    distances: dict[tuple[str, str, int, int, str], float] = {}
    for path in paths:
        try:
            with path.open(newline="") as file:
                for row in csv.DictReader(file):
                    s, c, seed, step, _ = (row.pop(key) for key in SCORE_KEYS)
                    distances |= {(s, c, int(seed), int(step), space): float(row[space]) for space in row}
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: is no scores.csv of game_gain.py ({error!r})") from None
    if not distances:
        raise UserError(f"{', '.join(map(str, paths))}: no scores")
    return Scores(distances)


def draw(scores: Scores, configurations: Sequence[str], path: Path) -> None:
    """Draw a row for each set and a column for each space; the first configuration is the line at 0."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    baseline, *others = configurations
    sets, spaces = scores.sets, scores.spaces
    colors: Mapping[str, object] = dict(zip(others, colormaps["tab10"].colors * 9, strict=False))  # type: ignore[attr-defined]
    figure = Figure(figsize=(1 + 3 * len(spaces), 0.8 + 2.4 * len(sets)), layout="constrained")
    panels = figure.subplots(len(sets), len(spaces), squeeze=False)
    for row, name in enumerate(sets):
        for column, space in enumerate(spaces):
            panel = panels[row][column]
            panel.axhline(0, color="black", linewidth=1)
            for i, configuration in enumerate(others):
                points = scores.ratios(name, configuration, baseline, space)
                if not points:
                    continue
                # Side by side, so that no bar hides another.
                shift = (i - (len(others) - 1) / 2) * 0.012 * points[-1][0]
                steps = [step + shift for step, _ in points]
                means = [one.mean - 1 for _, one in points]
                panel.plot(steps, means, marker=".", color=colors[configuration], label=configuration)
                if all(one.low > 0 for _, one in points):
                    low, high = ([one[k] - 1 for _, one in points] for k in (1, 2))
                    panel.vlines(steps, low, high, color=colors[configuration], alpha=0.6)
            panel.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            panel.set_xticks(sorted({step for s, _, _, step, _ in scores.distances if s == name}))
            panel.grid(alpha=0.3)
            panel.set_title(f"{name}, {space}", fontsize=9)
    panels[0][0].legend(fontsize=8, frameon=False)
    figure.supxlabel("training step")
    figure.supylabel(f"distance over that of {baseline}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scores", type=Path, nargs="+", help="scores.csv of game_gain.py, one for each series")
    parser.add_argument("--out", type=Path, default=Path("ratios.png"), help="the picture (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="configurations, the baseline first (default: all)")
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> int:
    scores = read(arguments.scores)
    known = scores.configurations
    for name in arguments.only or ():
        if name not in known:
            raise UserError(f"--only: {name} must be one of {', '.join(known)}")
    draw(scores, arguments.only or known, arguments.out)
    print(f"picture: {arguments.out}")
    return 0


def main(argv: list[str] | None = None) -> int:
    return cli.run(lambda _: run(parse(argv)), again="draws again")


if __name__ == "__main__":
    cli.leave(main())
