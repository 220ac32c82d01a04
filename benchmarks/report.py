"""The rows of a benchmark as a table, and those of the structure loss as a picture."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers import FLOOR, OURS, PROVIDERS

Row = dict[str, Any]
MEANS = (0, 3, 10)  # means of the features whose errors are measured; the larger, the more digits cancel


def _cells(row: Row) -> list[str]:
    def number(column: str, form: str) -> str:
        return "" if row[column] == "" else format(row[column], form)

    def several(what: str) -> str:
        return " ".join(number(f"{what}_error_mean{mean}", ".0e") for mean in MEANS).strip()

    return [
        *(str(row[column]) for column in ("B", "d", "dtype", "grads", "provider")),
        f"{row['median_ms']:.3g} ({row['p20_ms']:.3g}-{row['p80_ms']:.3g})",
        *(number(column, ".2f") for column in ("ratio_to_best_peer", "ratio_to_floor")),
        number("peak_extra_mb", ".1f"),
        *(several(what) for what in ("loss", "grad")),
        number("roofline_share", ".0%"),
    ]


def table(rows: list[Row], markdown: bool = False) -> str:
    """Print the rows as aligned text or Markdown, without empty columns."""
    means = "/".join(map(str, MEANS))
    head = ["B", "d", "dtype", "grads", "provider", "ms (p20-p80)", "/ best peer", "/ floor", "extra MB"]
    head += [f"{what} error, mean {means}" for what in ("loss", "gradient")]
    columns = [column for column in zip([*head, "roofline"], *map(_cells, rows), strict=True) if any(column[1:])]
    return aligned(list(zip(*columns, strict=True)), markdown)


def aligned(lines: Sequence[Sequence[str]], markdown: bool = False) -> str:
    """Print lines of cells, the first of which is the head, in columns or as a Markdown table."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    if not markdown:
        return "\n".join("  ".join(line).rstrip() for line in padded)
    padded.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def _draw(panel: Any, name: str, rows: list[Row], color: Any) -> None:
    rows = sorted(rows, key=lambda row: row["B"])
    sizes, low, middle, high = ([row[c] for row in rows] for c in ("B", "p20_ms", "median_ms", "p80_ms"))
    if name == FLOOR:
        panel.plot(sizes, middle, label="matrix products alone", color=color, linestyle="--", linewidth=1)
    else:
        width = 2.5 if name in OURS else 1.2
        panel.plot(sizes, middle, label=name, color=color, marker="o", markersize=4, linewidth=width)
    panel.fill_between(sizes, low, high, color=color, alpha=0.15, linewidth=0)


def picture(rows: list[Row], title: str, path: Path) -> None:
    """Draw time against B, a panel for each dtype, gradients and d; bands are the 20th to the 80th percentile."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    across = sorted({row["d"] for row in rows})
    down = list(dict.fromkeys((row["dtype"], row["grads"]) for row in rows))
    sizes = sorted({row["B"] for row in rows})
    names = list(dict.fromkeys(row["provider"] for row in rows))
    palette = dict(zip(PROVIDERS, colormaps["tab10"].colors, strict=False)) | {FLOOR: "black"}  # type: ignore[attr-defined]
    figure = Figure(figsize=(max(8, 1 + 4.5 * len(across)), 1.5 + 3 * len(down)), layout="constrained")
    panels = figure.subplots(len(down), len(across), sharex=True, sharey=True, squeeze=False)
    for (i, (dtype, grads)), (j, dim) in itertools.product(enumerate(down), enumerate(across)):
        panel = panels[i][j]
        for name in names:
            wanted = {"dtype": dtype, "grads": grads, "d": dim, "provider": name}
            _draw(panel, name, [row for row in rows if wanted.items() <= row.items()], palette[name])
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(sizes, map(str, sizes))
        panel.grid(alpha=0.3)
        panel.set_title(f"{dtype}, d = {dim}, gradient of {grads}", fontsize=10)
    panels[0][0].legend(fontsize=8, frameon=False)
    figure.supxlabel("batch B")
    figure.supylabel("forward + backward, ms")
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=150)
