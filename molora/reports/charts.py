"""Small charts as SVG: curves over steps, and bars. Colours come from the page's style."""

from __future__ import annotations

import math
from collections.abc import Sequence

from molora.reports.data import Curve
from molora.reports.markup import Html, tag

_WIDTH, _HEIGHT = 340, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 12, 24


def number(value: float) -> str:
    """A number in few characters."""
    if value == 0:
        return "0"
    if abs(value) >= 10_000 or abs(value) < 0.001:
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers inside a range, evenly apart."""
    if not high > low:
        return [low]
    rough = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def curve_chart(curve: Curve) -> Html:
    """A metric over the steps of a training."""
    points = [point for series in curve.series.values() for point in series]
    x_range = _range([x for x, _ in points], 0)
    y_range = _range([y for _, y in points], 0.06)
    marks: list[Html] = [*_grid(x_range, y_range)]
    for name, series in curve.series.items():
        places = [(_at_x(x, x_range), _at_y(y, y_range)) for x, y in series]
        kind = "first" if name == "train" else "second"
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        marks.append(tag("polyline", points=path, class_=f"line {kind}"))
        radius = 2.6 if len(places) <= 40 else 1.2
        for (x, y), (step, value) in zip(places, series, strict=True):
            title = tag("title", f"{name}, step {step:g}: {number(value)}")
            marks.append(tag("circle", title, cx=f"{x:.1f}", cy=f"{y:.1f}", r=radius, class_=f"dot {kind}"))
    ends = ", ".join(
        f"{name} from {number(one[0][1])} at step {one[0][0]:g} to {number(one[-1][1])} at step {one[-1][0]:g}"
        for name, one in curve.series.items()
    )
    legend = _legend(list(curve.series)) if len(curve.series) > 1 else None
    caption = tag("figcaption", curve.title, legend)
    return tag("figure", caption, _picture(f"{curve.title}: {ends}", marks), class_="chart")


def bar_chart(
    title: str, shares: Sequence[float], labels: Sequence[str], mark: tuple[float, str] | None = None, note: str = ""
) -> Html:
    """Shares as bars.

    Args:
        title: Above the bars.
        shares: Their heights.
        labels: Below them; an empty one is left out.
        mark: Where a line stands, in bars from the left, and what it says.
        note: Of the axis below.
    """
    y_range = (0.0, max(max(shares), 1e-9) * 1.1)
    wide = (_WIDTH - _LEFT - _RIGHT) / len(shares)
    marks: list[Html] = [*_grid(None, y_range, percent=True)]
    floor = _at_y(0, y_range)
    for index, (share, label) in enumerate(zip(shares, labels, strict=True)):
        x, y = _LEFT + index * wide, _at_y(share, y_range)
        gap = min(2.0, wide * 0.15)
        bar_title = tag("title", f"{label or index}: {share:.1%}")
        size = {"x": f"{x + gap:.1f}", "width": f"{wide - 2 * gap:.1f}", "y": f"{y:.1f}", "height": f"{floor - y:.1f}"}
        marks.append(tag("rect", bar_title, class_="bar", rx=1.5, **size))
        if label:
            marks.append(tag("text", label, x=f"{x + wide / 2:.1f}", y=_HEIGHT - 8, class_="tick middle"))
    if mark is not None:
        x = _LEFT + mark[0] * wide
        after = x < _WIDTH * 0.6
        marks.append(tag("line", x1=f"{x:.1f}", x2=f"{x:.1f}", y1=_TOP, y2=f"{floor:.1f}", class_="mark"))
        place = {"x": f"{x + (4 if after else -4):.1f}", "y": _TOP + 9}
        marks.append(tag("text", mark[1], class_="tick" if after else "tick end", **place))
    highest = max(range(len(shares)), key=lambda index: shares[index])
    said = f"{title}: the highest bar is {labels[highest] or highest} with {shares[highest]:.0%}"
    caption = tag("figcaption", title, tag("span", note, class_="note") if note else None)
    return tag("figure", caption, _picture(said, marks), class_="chart")


def _picture(label: str, marks: Sequence[Html]) -> Html:
    return tag("svg", *marks, viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img", aria_label=label)


def _legend(names: Sequence[str]) -> Html:
    kinds = ["first" if name == "train" else "second" for name in names]
    keys = [tag("span", name, class_=f"key {kind}") for name, kind in zip(names, kinds, strict=True)]
    return tag("span", *keys, class_="note")


def _range(values: Sequence[float], room: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    if low == high:
        return (low - (abs(low) or 1) * 0.5, high + (abs(high) or 1) * 0.5)
    return low - (high - low) * room, high + (high - low) * room


def _at_x(value: float, within: tuple[float, float]) -> float:
    return _LEFT + (value - within[0]) / (within[1] - within[0]) * (_WIDTH - _LEFT - _RIGHT)


def _at_y(value: float, within: tuple[float, float]) -> float:
    return _HEIGHT - _BOTTOM - (value - within[0]) / (within[1] - within[0]) * (_HEIGHT - _TOP - _BOTTOM)


def _grid(x_range: tuple[float, float] | None, y_range: tuple[float, float], percent: bool = False) -> list[Html]:
    marks = []
    for value in ticks(*y_range, 4):
        y = _at_y(value, y_range)
        text = f"{value:.4g}" if not percent else f"{value * 100:.3g} %"
        text = number(value) if len(text) > 6 else text
        marks.append(tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=f"{y:.1f}", y2=f"{y:.1f}", class_="grid"))
        marks.append(tag("text", text, x=_LEFT - 6, y=f"{y + 3.5:.1f}", class_="tick end"))
    if x_range is None:
        return marks
    for value in ticks(*x_range, 5):
        if value == int(value):  # there are no parts of a step
            x = f"{_at_x(value, x_range):.1f}"
            marks.append(tag("text", f"{value:g}", x=x, y=_HEIGHT - 8, class_="tick middle"))
    return marks
