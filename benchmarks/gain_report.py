"""What the runs of benchmarks/game_gain.py say: paired ratios with 95% intervals, steps saved, pictures."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gain_plan import Job, Plan
from benchmarks.report import aligned

Results = Mapping[Job, Mapping[str, Any]]
Costs = Mapping[str, Mapping[str, Mapping[str, float]]]

SCORE_KEYS = ("set", "configuration", "seed", "step", "commit")  # columns of scores.csv, before those of the spaces

# 97.5% quantiles of Student's t by degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


class Interval(NamedTuple):
    """A geometric mean of ratios and its 95% interval, which is infinite for a single ratio."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isinf(self.high):
            return f"{self.mean - 1:+.1%}"
        return f"{self.mean - 1:+.1%} [{self.low - 1:+.1%}, {self.high - 1:+.1%}]"


def interval(ratios: Sequence[float]) -> Interval:
    """The mean of the ratios' logarithms with Student's interval; ValueError for none or one that is not positive."""
    if not ratios or min(ratios) <= 0:
        raise ValueError(f"ratios={list(ratios)}: must be positive, and at least one")
    logs = [math.log(ratio) for ratio in ratios]
    middle = statistics.mean(logs)
    if len(logs) == 1:
        return Interval(math.exp(middle), 0.0, math.inf)
    half = _T[min(len(logs) - 1, len(_T)) - 1] * statistics.stdev(logs) / math.sqrt(len(logs))
    return Interval(math.exp(middle), math.exp(middle - half), math.exp(middle + half))


def spaces(found: Results) -> list[str]:
    """The names of the distances, in the order of the judges."""
    return list(next(iter(found.values()))["scores"][0]["floor"])


def curve(line: Mapping[str, Any], space: str) -> list[tuple[int, float]]:
    """Distance at each scored step."""
    return [(score["step"], score[space]) for score in line["scores"]]


def seeds_of(plan: Plan, found: Results, name: str, configuration: str) -> list[int]:
    """The seeds with which both a configuration and the baseline have finished on a set."""
    needed = (configuration, plan.baseline)
    return [seed for seed in plan.seeds if all(Job(name, c, seed) in found for c in needed)]


def ratios(plan: Plan, found: Results, name: str, configuration: str, space: str, index: int = -1) -> list[float]:
    """Distance over the baseline's at the scored step number `index`, for each seed that has both."""
    return [
        curve(found[Job(name, configuration, seed)], space)[index][1]
        / curve(found[Job(name, plan.baseline, seed)], space)[index][1]
        for seed in seeds_of(plan, found, name, configuration)
    ]


def reached(points: Sequence[tuple[float, float]], distance: float) -> float | None:
    """Where a curve first comes down to `distance`, by lines through (x, log distance); None if it does not.

    At the first point or before: there.
    """
    (x0, y0), *rest = points
    if y0 <= distance:
        return x0
    for x1, y1 in rest:
        if y1 <= distance:
            return x0 + (x1 - x0) * math.log(y0 / distance) / math.log(y0 / y1)
        x0, y0 = x1, y1
    return None


def fewer_steps(plan: Plan, found: Results, name: str, configuration: str, space: str) -> list[float | None]:
    """For each seed: the baseline's steps over those that the configuration takes to the baseline's last distance."""
    factors: list[float | None] = []
    for seed in seeds_of(plan, found, name, configuration):
        last, distance = curve(found[Job(name, plan.baseline, seed)], space)[-1]
        step = reached(curve(found[Job(name, configuration, seed)], space), distance)
        factors.append(None if step is None else last / step)
    return factors


def cost_at(plan: Plan, costs: Costs, name: str, configuration: str, step: int) -> float:
    """What `step` iterations cost, in plain iterations of the baseline."""
    config, of = plan.config(Job(name, configuration, plan.seeds[0])), costs[name][configuration]
    unit = costs[name][plan.baseline]["plain"]
    playing = sum(config.game.playing(i) for i in range(step))
    return sum(n * of[phase] / unit for n, phase in ((step - playing, "plain"), (playing, "game")) if n)


def tables(plan: Plan, found: Results, costs: Costs | None) -> Iterator[str]:
    """The expectation, and of each set Markdown tables: distances at each step, steps to the baseline's last one."""
    yield f"{plan.name}. Expected: {plan.expectation}\n"
    names = spaces(found)
    others = [c for c in plan.configurations if c != plan.baseline]
    for name in plan.sets:
        done = [seed for seed in plan.seeds if Job(name, plan.baseline, seed) in found]
        if not done:
            continue
        plain = [found[Job(name, plan.baseline, seed)] for seed in done]
        floors = [statistics.mean(line["scores"][-1]["floor"][space] for line in plain) for space in names]
        yield f"{name}: seeds {', '.join(map(str, done))}; floors {', '.join(f'{floor:.4g}' for floor in floors)}\n"
        for index, step in enumerate(plan.score_at):
            lines = [[f"step {step}", *names]]
            values = [[curve(line, space)[index][1] for line in plain] for space in names]
            lines.append([plan.baseline, *(f"{statistics.mean(v):.4g} ({min(v):.4g} to {max(v):.4g})" for v in values)])
            for configuration in others:
                if seeds_of(plan, found, name, configuration):
                    cells = [str(interval(ratios(plan, found, name, configuration, s, index))) for s in names]
                    lines.append([configuration, *cells])
            yield aligned(lines, markdown=True) + "\n"
        head = f"{plan.baseline}'s {plan.score_at[-1]} steps over those to its last distance"
        lines = [[head, *names, *([] if costs is None else ["cost of all steps"])]]
        for configuration in others:
            if not seeds_of(plan, found, name, configuration):
                continue
            cells = []
            for space in names:
                factors = fewer_steps(plan, found, name, configuration, space)
                cells.append(", ".join("never" if factor is None else f"{factor:.2f}" for factor in factors))
            if costs is not None:
                whole, plain_cost = (cost_at(plan, costs, name, c, plan.score_at[-1]) for c in
                                     (configuration, plan.baseline))  # fmt: skip
                cells.append(f"{whole / plain_cost:.2f}")
            lines.append([configuration, *cells])
        if len(lines) > 1:
            if len(plan.score_at) > 1:  # between two scores a distance is reached, at one it is or is not
                yield aligned(lines, markdown=True) + "\n"
            yield aligned(losses(plan, found, name), markdown=True) + "\n"


def losses(plan: Plan, found: Results, name: str) -> list[list[str]]:
    """Lines of a table: the last denoising losses by quartile of the noise, and how S changed them."""
    lines = [["last denoising loss, noise from least to most", *(f"quartile {q}" for q in range(1, 5))]]
    for configuration in plan.configurations:
        seeds = seeds_of(plan, found, name, configuration)
        runs = [found[Job(name, configuration, seed)]["loss_by_noise_quartile"] for seed in seeds]
        plain = [found[Job(name, plan.baseline, seed)]["loss_by_noise_quartile"] for seed in seeds]
        cells = []
        for q in range(4):
            pairs = [(of[q], base[q]) for of, base in zip(runs, plain, strict=True) if of[q] and base[q]]
            if not pairs:
                cells.append("")
            elif configuration == plan.baseline:
                cells.append(f"{statistics.mean(of for of, _ in pairs):.4g}")
            else:
                cells.append(str(interval([of / base for of, base in pairs])))
        if seeds:
            lines.append([configuration, *cells])
    return lines


def score_lines(plan: Plan, found: Results) -> Iterator[list[Any]]:
    """Lines of scores.csv, the first of which is the head: every distance with its run, step and commit."""
    names = spaces(found)
    yield [*SCORE_KEYS, *names]
    for job in plan.jobs:
        for score in found[job]["scores"] if job in found else ():
            where = [job.set, job.configuration, job.seed, score["step"], found[job]["commit"]]
            yield [*where, *(f"{score[name]:.6g}" for name in names)]


def picture(plan: Plan, found: Results, costs: Costs | None, out: Path) -> list[Path]:
    """Draw distance against steps, and against time where costs are known: a column a set, a row a space."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    names, sets = spaces(found), [name for name in plan.sets if any(job.set == name for job in found)]
    colors = dict(zip(plan.configurations, colormaps["tab10"].colors * 9, strict=False))  # type: ignore[attr-defined]
    paths = []
    for axis, label in (("steps", "training step"), ("time", "time, in plain iterations")):
        if axis == "time" and costs is None:
            continue
        figure = Figure(figsize=(1 + 4 * len(sets), 1 + 2.4 * len(names)), layout="constrained")
        panels = figure.subplots(len(names), len(sets), squeeze=False)
        for (row, space), (column, name) in ((r, c) for r in enumerate(names) for c in enumerate(sets)):
            panel = panels[row][column]
            for configuration in plan.configurations:
                lines = [found[job] for s in plan.seeds if (job := Job(name, configuration, s)) in found]
                if not lines:
                    continue
                x: list[float] = list(plan.score_at)
                if axis == "time" and costs is not None:
                    x = [cost_at(plan, costs, name, configuration, step) for step in plan.score_at]
                values = list(zip(*([d for _, d in curve(line, space)] for line in lines), strict=True))
                color = colors[configuration]
                panel.plot(x, [statistics.mean(v) for v in values], marker=".", color=color, label=configuration)
                panel.fill_between(x, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.15)
            panel.set_yscale("log")
            panel.grid(alpha=0.3, which="both")
            panel.set_title(f"{name}, {space}", fontsize=9)
        panels[0][0].legend(fontsize=8, frameon=False)
        figure.supxlabel(label)
        figure.supylabel("Frechet distance: mean, lowest and highest of the seeds")
        path = out / f"distance-{axis}.png"
        figure.savefig(path, dpi=110)
        paths.append(path)
    return paths
