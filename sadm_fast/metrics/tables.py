"""Lines of scores as people read them: the variant that each is of, its columns, the best, tables for a terminal."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from sadm_fast.metrics.pretrained import published_name

_FLOOR = "floor: real images against real ones"
_LOSSES = {"loss_denoise": "loss", **{f"loss_denoise_q{part}": f"loss_q{part}" for part in range(1, 5)}}


class Column(NamedTuple):
    """One score of several lines."""

    name: str
    values: list[float | None]  # None: a line has none such
    best: set[
        int
    ]  # the places of the lowest of distances and losses, and of the highest of other scores; none if all are equal


def score_columns(rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    """Every score of `Evaluator.score`'s lines, and their losses, from left to right."""
    samples = next((row["samples"] for row in rows if "samples" in row), 0)
    found: list[Column] = []

    def add(name: str, values: list[Any], best: Callable[[list[float]], float]) -> None:
        numbers = [float(value) if isinstance(value, int | float) else None for value in values]
        known = [value for value in numbers if value is not None and math.isfinite(value)]
        if known:
            equal = len(known) > 1 and min(known) == max(known)
            places = {i for i, value in enumerate(numbers) if value == best(known)}
            found.append(Column(name, numbers, set() if equal else places))

    def keys(of: str) -> list[str]:
        inner = [row.get(of) for row in rows]
        return list(dict.fromkeys(key for value in inner if isinstance(value, Mapping) for key in value))

    for metric in keys("floor"):
        add(published_name(metric, samples), [row.get(metric) for row in rows], min)
    add("IS", [row.get("inception_score") for row in rows], max)
    for loss, name in _LOSSES.items():
        add(name, [row.get(loss) for row in rows], min)
    for detail, best in (("kid", min), ("precision", max), ("recall", max)):
        for metric in keys(detail):
            of = [row.get(detail) for row in rows]
            values = [value.get(metric) if isinstance(value, Mapping) else None for value in of]
            add(f"{detail}_{_space(metric)}", values, best)
    return found


def variant(row: dict[str, Any]) -> dict[str, Any]:
    """What tells a line of scores from others: {"guidance": scale, "steps": of the sampler, "ema": width or decay}."""
    profile, sampling = row["weights"]["ema"] or {}, row["sampling"]
    return {
        "guidance": sampling["guidance"]["scale"],
        "steps": sampling["sampler"]["steps"],
        "ema": profile.get("std", profile.get("decay")),
    }


def losses_line(row: dict[str, Any]) -> str:
    """Print the denoising losses of a line of scores: "loss 0.12, by noise 0.04 0.06 0.1 0.28"; "" if it has none."""
    if row.get("loss_denoise") is None:
        return ""
    parts = [row[f"loss_denoise_q{part}"] for part in range(1, 5)]
    return f"loss {row['loss_denoise']:.4g}, by noise " + " ".join("-" if p is None else f"{p:.3g}" for p in parts)


def one_line(scores: dict[str, Any]) -> str:
    """Print the distances of `RunEvaluation.score` for the terminal: "fid_classifier 1.23, ... of 2000 samples"."""
    found = ", ".join(f"{published_name(metric, scores['samples'])} {scores[metric]:.4g}" for metric in scores["floor"])
    return f"{found} of {scores['samples']} samples"


def table(rows: Sequence[dict[str, Any]], swept: Sequence[str]) -> str:
    """Scores as a table, one line for each of `rows`; the best of a column has a star.

    rows: of `Evaluator.score`, with a key for each name in `swept`.
    """
    columns = score_columns(rows)
    cells = [[*swept, *(column.name for column in columns)]]
    for i, row in enumerate(rows):
        numbers = [_cell(column.values[i]) + ("*" if len(rows) > 1 and i in column.best else " ") for column in columns]
        cells.append([*(str(row[name]) for name in swept), *numbers])
    floors = ["" if floor is None else f"{floor:.4g} " for floor in rows[0]["floor"].values()]
    cells.append([*["floor", *[""] * (len(swept) - 1)][: len(swept)], *floors, *[""] * (len(columns) - len(floors))])
    return "\n".join([aligned(cells), f"{rows[0]['samples']} samples each; * the best of a column; {_FLOOR}"])


def summary(row: dict[str, Any]) -> str:
    """Scores of one set of samples as a table, one line for each feature space. row: of `Evaluator.score`."""
    cells = [["", "distance", "floor", "KID", "precision", "recall"]]
    for metric, floor in row["floor"].items():
        values = [row[metric], floor, *(row.get(of, {}).get(metric) for of in ("kid", "precision", "recall"))]
        numbers = ["" if value is None else f"{value:.4g}" for value in values]
        cells.append([published_name(metric, row["samples"]), *numbers])
    if "inception_score" in row:
        cells.append(["IS", f"{row['inception_score']:.4g}", *[""] * 4])
    return "\n".join([aligned(cells), f"{row['samples']} samples; {_FLOOR}"])


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _space(metric: str) -> str:
    return metric.removeprefix("fid_").removeprefix("fd_")


def aligned(cells: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join(lines)
