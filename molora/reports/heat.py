"""Heatmaps as SVG. What colour a value has is said here and, for the page's controls, once more in `page.js`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from molora.reports.markup import Html, scrolling, tag
from molora.routing.statistics import DEAD_BELOW

LOAD, SHARE, COSINE = "load", "share", "cosine"
"""What values are: shares of selections, pale where they are even; shares of weight, full at three times an even one;
numbers from -1 to 1."""

_CELL = 38
_SMALL = (13, 11)


def shade(kind: str, value: float, experts: int) -> tuple[str, float]:
    """The class and the opacity of a cell.

    Args:
        kind: One of the names above.
        value: What stands there.
        experts: Experts of the row, for shares.
    """
    if kind == LOAD:
        if value < DEAD_BELOW / experts:
            return "dead", 1.0
        distance = math.log2(value * experts) / 2
        return ("high" if distance > 0 else "low"), round(min(abs(distance), 1.0), 2)
    if kind == COSINE:
        return ("high" if value > 0 else "low"), round(min(abs(value), 1.0), 2)
    return "high", round(min(value * experts / 3, 1.0), 2)


def matrix(
    kind: str, values: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str], label: str, key: str
) -> Html:
    """A heatmap with its numbers in it.

    Args:
        kind: What the values are.
        values: Rows of them; a row that is too short has gaps.
        rows: Names at the left.
        columns: Names above.
        label: What it shows, for those who do not see it.
        key: By which the page's script finds it.
    """
    left = 14 + 6.4 * min(max(map(len, rows)), 26)
    marks = [
        tag("text", name, x=f"{left + (index + 0.5) * _CELL:.1f}", y=14, class_="tick middle")
        for index, name in enumerate(columns)
    ]
    for at, (name, row) in enumerate(zip(rows, values, strict=True)):
        top = 22 + at * (_CELL - 10)
        marks.append(tag("text", _cut(name), tag("title", name), x=f"{left - 6:.1f}", y=top + 18, class_="tick end"))
        for index in range(len(columns)):
            value = row[index] if index < len(row) else None
            kind_of, opacity = ("none", 0.0) if value is None else shade(kind, value, len(row))
            x = f"{left + index * _CELL:.1f}"
            place = {"x": x, "y": top, "width": _CELL - 2, "height": _CELL - 12}
            marks.append(tag("rect", class_=f"cell {kind_of}", fill_opacity=opacity, rx=2, **place))
            text = "" if value is None else number_in(value)
            middle = f"{left + (index + 0.5) * _CELL - 1:.1f}"
            marks.append(tag("text", text, x=middle, y=top + 17, class_="in-cell"))
    width, height = left + len(columns) * _CELL + 4, 26 + len(rows) * (_CELL - 10)
    size = {"width": f"{width:.0f}", "height": f"{height:.0f}", "viewBox": f"0 0 {width:.0f} {height:.0f}"}
    picture = tag("svg", *marks, role="img", aria_label=label, data_matrix=key, data_kind=kind, **size)
    return scrolling(picture, label)


def number_in(value: float) -> str:
    """A number from -1 to 1 that fits into a cell."""
    text = f"{value:.2f}"
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text


def small(kind: str, values: Sequence[Sequence[float]], rows: Sequence[str], title: str, experts: int) -> Html:
    """A heatmap without numbers, small enough to stand beside others of its kind.

    Args:
        kind: What the values are.
        values: Rows of them.
        rows: Names at the left.
        title: Above it.
        experts: Columns.
    """
    wide, high = _SMALL
    left = 10 + 6.2 * max(map(len, rows))
    marks = []
    for index in range(experts):
        if experts <= 16 or not index % 8:
            marks.append(tag("text", str(index), x=f"{left + (index + 0.5) * wide:.1f}", y=10, class_="tiny middle"))
    for at, (name, row) in enumerate(zip(rows, values, strict=True)):
        top = 15 + at * high
        if len(rows) <= 12 or not at % 5 or (at == len(rows) - 1 and at % 5 > 1):
            marks.append(tag("text", name, x=f"{left - 4:.1f}", y=top + 8.5, class_="tiny end"))
        for index in range(len(row)):
            kind_of, opacity = shade(kind, row[index], len(row))
            place = {"x": f"{left + index * wide:.1f}", "y": top, "width": wide - 1, "height": high - 1}
            text = tag("title", f"{name}, expert {index}: {row[index]:.1%}")
            marks.append(tag("rect", text, class_=f"cell {kind_of}", fill_opacity=opacity, **place))
    width, height = left + experts * wide + 2, 17 + len(rows) * high
    size = {"width": f"{width:.0f}", "height": f"{height:.0f}", "viewBox": f"0 0 {width:.0f} {height:.0f}"}
    dead = sum(shade(kind, value, len(row))[0] == "dead" for row in values for value in row)
    said = f"load of {experts} experts in {len(rows)} linears {title}, {dead} of them dead"
    picture = tag("svg", *marks, role="img", aria_label=said, data_small=True, **size)
    return tag("figure", tag("figcaption", title), picture, class_="small")


def _cut(name: str) -> str:
    return name if len(name) <= 26 else "…" + name[-25:]
