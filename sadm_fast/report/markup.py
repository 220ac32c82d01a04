"""Pieces of HTML, and numbers as text. Whatever comes from a run is escaped here."""

import html
import json
import math
from typing import Any

from sadm_fast.config_tree import flatten


def escape(value: object) -> str:
    """Turn any value into text that is safe between tags and in quoted attributes."""
    return html.escape(str(value), quote=True)


def missing(sentence: str) -> str:
    """Mark a sentence as standing for something that is not there."""
    return f'<p class="missing">{escape(sentence)}</p>'


def figure(content: str, caption: str) -> str:
    """Make a figure; content and caption are HTML."""
    return f"<figure>{content}<figcaption>{caption}</figcaption></figure>"


def table(values: dict[str, Any]) -> str:
    """Make a table, a row for each value; values are JSON, strings without quotes."""
    rows = []
    for key, value in values.items():
        text = plain(value)
        short = ' class="short"' if len(text) <= 24 else ""
        rows.append(f"<tr><th>{escape(key)}</th><td{short}>{escape(text)}</td></tr>")
    return f"<table><tbody>{''.join(rows)}</tbody></table>" if rows else ""


def inline(values: dict[str, Any]) -> str:
    """Write nested values as one line of text."""
    return ", ".join(f"{escape(key)} {escape(plain(value))}" for key, value in flatten(values).items())


def plain(value: object) -> str:
    """Turn a JSON value into text; not escaped."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def show(value: float | None, digits: int = 3) -> str:
    """Round a number for reading; the tag's `value` keeps every digit."""
    if value is None or not math.isfinite(value):
        return "–"
    shown = f"{value:,.0f}" if abs(value) >= 10**digits - 0.5 else f"{value:.{digits}g}"
    return f'<data value="{value!r}">{shown}</data>'


def change(first: float, last: float) -> str:
    """Compare the last score with the first in words: "3.2 times lower", "12% higher", "unchanged"."""
    if first <= 0 or last <= 0:
        return f"{abs(last - first):.3g} {'lower' if last < first else 'higher'}"
    ratio = max(first, last) / min(first, last)
    if ratio < 1.005:
        return "unchanged"
    by = f"{ratio:.3g} times" if ratio >= 1.5 else f"{abs(last / first - 1):.0%}"
    return f"{by} {'lower' if last < first else 'higher'}"


def count(amount: float) -> str:
    """Write a large number in words: "1.25 million"."""
    for size, unit in ((1e9, " billion"), (1e6, " million"), (1e3, " thousand")):
        if amount >= size:
            return f"{amount / size:.3g}{unit}"
    return f"{amount:.0f}"


def duration(seconds: float) -> str:
    """Write seconds as "3 h 5 min", "6 min 40 s" or "12 s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
