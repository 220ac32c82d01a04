"""The report's charts as inline SVG in the page's colours, and its pictures as data URIs."""

import base64
import io
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from PIL import Image

from sadm_fast.report.reading import Relations
from sadm_fast.report.style import LIGHT

HALF_WIDTH = (5.3, 3.1)  # inches; the page scales a chart to the width of its column
THIRD_WIDTH = (3.6, 2.7)
MAP_SIDE = 2.75  # inches of a relation matrix; three of them and two scales span the page
MOST_NAMED, MOST_BOUNDED = 16, 32  # so many classes have their names on the axes; so many, lines between them
LARGEST_MATRIX = 128  # samples a side; of larger matrices evenly chosen samples are drawn: the page stays small

_STYLE: Any = {  # matplotlib's own type lists every key it knows
    "svg.fonttype": "none",  # text stays text, in the page's own font
    "svg.hashsalt": "sadm_fast",
    "text.parse_math": False,  # class names may hold dollar signs
    "axes.unicode_minus": True,
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9,
    "text.color": LIGHT["ink"],
    "axes.labelcolor": LIGHT["muted"],
    "axes.edgecolor": LIGHT["muted"],
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LIGHT["rule"],
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.7,
}


class Curve(NamedTuple):
    """A line of a chart: steps and values float64 [N] (NaN: a gap), its legend, and the role that gives its colour."""

    steps: np.ndarray
    values: np.ndarray
    name: str
    role: str
    dashes: str = "-"


class Picture(NamedTuple):
    """A picture for the page: its data URI and its size in CSS pixels."""

    uri: str
    width: int
    height: int


def line_chart(
    key: str,
    curves: Sequence[Curve],
    *,
    y_label: str,
    log: bool,
    size: tuple[float, float] = HALF_WIDTH,
    smooth: bool = True,
    floor: float | None = None,
    from_zero: bool = False,
) -> str:
    """Draw curves over training steps; of a long one the running mean, with the logged values faint behind it.

    `key` is unique on the page. `log` is dropped where a curve is not positive. `floor` is a dashed line.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        every_value = np.concatenate([curve.values for curve in curves])
        log = log and bool(np.all(every_value[np.isfinite(every_value)] > 0))
        for curve in curves:
            color = LIGHT[curve.role]
            style: dict[str, Any] = {"color": color, "linestyle": curve.dashes, "label": curve.name}
            window = max(1, curve.values.size // 30) if smooth else 1
            if window > 1:
                axes.plot(*_envelope(curve.steps, curve.values), color=color, alpha=0.28, linewidth=0.8)
                axes.plot(*_running_mean(curve.steps, curve.values, window), **style)
            else:
                marker = "o" if curve.values.size <= 40 else ""
                axes.plot(curve.steps, curve.values, marker=marker, markersize=3.5, **style)
        if floor is not None and (floor > 0 or not log):
            axes.axhline(floor, color=LIGHT["floor"], linestyle=(0, (4, 2)), label="real versus real")
        if log:
            _log_axis(axes)
        elif from_zero:
            axes.set_ylim(bottom=0, top=None if np.nanmax(every_value, initial=0) > 0 else 1)
        if len(curves) > 1 or floor is not None:
            axes.legend(loc="best")
        axes.xaxis.set_major_locator(MaxNLocator(5 if size[0] > 4 else 4, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.set_xlabel("training step")
        axes.set_ylabel(y_label)
        return _to_svg(figure, key, f"{y_label} over training steps")


def relation_scales(matrices: Sequence[Relations]) -> tuple[float, float, float]:
    """Return the lowest and highest relation, and the largest difference that is no outlier, over all matrices."""
    relations = np.concatenate([np.ravel(matrix) for item in matrices for matrix in (item.real, item.fake)])
    gaps = np.concatenate([np.ravel(np.abs(item.fake - item.real)) for item in matrices])
    relations, gaps = relations[np.isfinite(relations)], gaps[np.isfinite(gaps)]
    if not relations.size or not gaps.size:
        return 0.0, 1.0, 1.0
    low, high = float(relations.min()), float(relations.max())
    largest = float(np.quantile(gaps, 0.995))
    return low, high if high > low else low + 1, largest if largest > 0 else 1.0


def relation_maps(key: str, item: Relations, class_names: Sequence[str], scales: tuple[float, float, float]) -> str:
    """Draw R(F), R(G) and R(G) - R(F) side by side, with class boundaries; `class_names` is indexed by label."""
    low, high, largest = scales
    keep = np.unique(np.linspace(0, item.labels.size - 1, LARGEST_MATRIX).round().astype(int))
    grid, labels = np.ix_(keep, keep), item.labels[keep]
    real, fake = item.real[grid], item.fake[grid]
    panels = (
        ("R(F): the real images", real, "viridis", low, high),
        ("R(G): their estimates x̂0", fake, "viridis", low, high),
        ("difference R(G) − R(F)", fake - real, "PuOr_r", -largest, largest),
    )
    names = [_short(class_names, int(label)) for label in dict.fromkeys(labels.tolist())]
    margin = 0.35 + 0.07 * max(map(len, names)) if len(names) <= MOST_NAMED else 0.3  # inches, left and below
    lefts, side = (margin, margin + MAP_SIDE + 0.2, margin + 2 * MAP_SIDE + 1.4), MAP_SIDE
    width, height = lefts[2] + side + 0.95, margin + side + 0.35
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height))
        for (title, matrix, colors, bottom, top), left in zip(panels, lefts, strict=True):
            axes = figure.add_axes((left / width, margin / height, side / width, side / height))
            image = axes.imshow(matrix, cmap=colors, vmin=bottom, vmax=top, interpolation="none")
            axes.set_title(title)
            axes.grid(False)
            axes.spines[:].set_visible(False)
            _mark_classes(axes, labels, names, "white" if colors == "viridis" else "#555555")
            if left == lefts[0]:
                continue  # R(F) and R(G) share one scale, which stands beside R(G)
            axes.set_yticks([])
            beside = ((left + side + 0.1) / width, margin / height, 0.11 / width, side / height)
            bar = figure.colorbar(image, cax=figure.add_axes(beside))
            assert bar.solids is not None
            bar.solids.set_rasterized(True)
            bar.outline.set_visible(False)
            bar.locator = MaxNLocator(5)
            bar.update_ticks()
            bar.set_label("relation" if left == lefts[1] else "difference of relations")
        return _to_svg(figure, key, f"Relation matrices at step {item.step}")


def picture(path: Path, *, target_width: int, most_bytes: int) -> Picture | None:
    """Read an image file, enlarged by a whole factor or reduced towards `target_width`; None if unreadable."""
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError):
        return None
    shown_width, shown_height = image.size
    if image.width < target_width:
        factor = max(1, target_width // image.width)
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    elif image.width > target_width:
        image.thumbnail((target_width, 4 * target_width), Image.Resampling.LANCZOS)
    data = _encode(image, "PNG")
    kind = "png"
    while len(data) > most_bytes:
        data, kind = _encode(image, "JPEG"), "jpeg"
        image = image.resize((max(1, image.width * 3 // 4), max(1, image.height * 3 // 4)))
    return Picture(f"data:image/{kind};base64,{base64.b64encode(data).decode()}", shown_width, shown_height)


def _encode(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=85)  # PNG has no quality and ignores it
    return buffer.getvalue()


def _running_mean(steps: np.ndarray, values: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Compute the centred mean of `window` values, over the finite ones; at most 300 points."""
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    index = np.unique(np.linspace(0, values.size - 1, 300).round().astype(int))
    # at the start the window shrinks and stays symmetric, so that the first steep fall is not flattened
    reach = np.minimum(window // 2, index)
    first, last = index - reach, np.minimum(index + reach + 1, values.size)
    number_finite = counts[last] - counts[first]
    means = (sums[last] - sums[first]) / np.maximum(number_finite, 1)
    return steps[index], np.where(number_finite > 0, means, np.nan)


def _envelope(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the values; of a long curve the lowest and highest of each of 250 stretches, so that spikes remain."""
    if values.size <= 500:
        return steps, values
    chosen: list[int] = []
    for stretch in np.array_split(np.arange(values.size), 250):
        finite = stretch[np.isfinite(values[stretch])]
        if finite.size:
            chosen += sorted({int(finite[values[finite].argmin()]), int(finite[values[finite].argmax()])})
    return steps[chosen], values[chosen]


def _log_axis(axes: Axes) -> None:
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    decades = np.log10(high / low)
    if decades < 1.2:
        marks: tuple[float, ...] = (1.0, 2.0, 3.0, 5.0, 7.0)
    elif decades < 2.5:
        marks = (1.0, 2.0, 5.0)
    else:
        marks = (1.0, 3.0) if decades < 4 else (1.0,)
    if decades < 0.4:  # so narrow that evenly spaced ticks are round numbers
        axes.yaxis.set_major_locator(MaxNLocator(5))
    else:
        axes.yaxis.set_major_locator(LogLocator(subs=marks, numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_locator(NullLocator())


def _mark_classes(axes: Axes, labels: np.ndarray, names: Sequence[str], color: str) -> None:
    """Draw lines between the classes, and their names along two sides, unless there are too many."""
    starts = np.concatenate([[0], np.flatnonzero(np.diff(labels)) + 1, [labels.size]])
    axes.set_xticks([])
    axes.set_yticks([])
    if len(names) > MOST_BOUNDED:
        return
    for start in starts[1:-1]:
        axes.axhline(start - 0.5, color=color, linewidth=0.5, alpha=0.8)
        axes.axvline(start - 0.5, color=color, linewidth=0.5, alpha=0.8)
    if len(names) > MOST_NAMED:
        return
    middles = (starts[:-1] + starts[1:] - 1) / 2
    axes.set_xticks(middles, names, rotation=90 if max(map(len, names)) > 2 else 0)
    axes.set_yticks(middles, names)
    axes.tick_params(length=0, labelsize=8)


def printable(text: str) -> str:
    """Replace what matplotlib cannot draw or XML cannot hold (control characters, surrogates) by spaces."""
    return "".join(character if character.isprintable() else " " for character in text)


def _short(class_names: Sequence[str], label: int) -> str:
    name = class_names[label] if 0 <= label < len(class_names) else str(label)
    name = printable(name)
    return name if len(name) <= 12 else f"{name[:11]}…"


def _to_svg(figure: Figure, key: str, description: str) -> str:
    """Turn the figure into an <svg> element for an HTML page: no header, no namespace, ids that start with `key`."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        # the browser draws the text, so glyphs that matplotlib's font lacks do not matter
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    view_box = re.search(r'viewBox="[^"]*"', text)
    body = text[text.index(">", text.index("<svg")) + 1 :]
    body = re.sub(r"<[^>]+>", lambda tag: _adapt(tag[0], key), body)
    body = re.sub(r"\s*\n\s*", "\n", body)
    label = re.sub(r"[^\w ,.()-]", "", description)
    return f'<svg class="chart" role="img" aria-label="{label}" {view_box[0] if view_box else ""}>{body}'


def _adapt(tag: str, key: str) -> str:
    tag = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{key}-", tag)
    tag = re.sub(r"font: (?:[\w.]+ )*?([\d.]+px) [^;\"]*", r"font-size: \1", tag)
    for role, color in LIGHT.items():
        tag = tag.replace(color, f"var(--{role})")
    return tag
