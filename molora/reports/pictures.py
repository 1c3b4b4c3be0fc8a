"""Pictures of a report for model cards. They need matplotlib, which nothing else here does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from molora.reports.data import Affinity, Cosines, Curve, Loads, Matrix, Report
from molora.reports.names import by_kind
from molora.reports.routing_sections import affinity_views
from molora.routing.statistics import DEAD_BELOW


def available() -> bool:
    """Whether pictures can be made here."""
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None


def draw(report: Report, folder: Path) -> dict[str, str]:
    """Write the pictures for which there is data.

    Args:
        report: The report.
        folder: Where to.

    Returns:
        Names of the files, and what they show.
    """
    made: dict[str, tuple[Any, str]] = {}
    if not isinstance(report.curves, str):
        made["training.png"] = _curves(report.curves), "loss and routing over training"
    if isinstance(report.loads, Loads):
        made["load.png"] = _loads(report.loads), "load of experts, linear by linear"
    if isinstance(report.affinity, Affinity):
        names, views = affinity_views(report.affinity)
        figure = _matrix(views[0], report.affinity.tasks, names[0], "Oranges", (0.0, None))
        made["tasks.png"] = figure, f"share of each task's mixing weight by expert, {names[0]}"
    if isinstance(report.cosines, Cosines):
        labels = max(report.cosines.labels, key=len)
        figure = _matrix(report.cosines.mean, labels, "cosine of experts, mean over linears", "PuOr_r", (-1.0, 1.0))
        made["experts.png"] = figure, "cosine of what two experts add, mean over linears"
    for name, (figure, _) in made.items():
        figure.savefig(folder / name, dpi=150, facecolor="white")
    return {name: shown for name, (_, shown) in made.items()}


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _curves(curves: Sequence[Curve]) -> Any:
    columns = 3
    lines = -(-len(curves) // columns)
    figure = _figure(9, 2.2 * lines)
    for index, curve in enumerate(curves):
        axes = figure.add_subplot(lines, columns, index + 1)
        for name, series in curve.series.items():
            axes.plot([x for x, _ in series], [y for _, y in series], marker="o", markersize=2.5, label=name)
        axes.set_title(curve.title, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
        if len(curve.series) > 1:
            axes.legend(fontsize=7, frameon=False)
    return figure


def _loads(loads: Loads) -> Any:
    """One heatmap a kind of linear; values are multiples of an even share, on a scale of doublings."""
    import numpy as np

    groups = by_kind(loads.modules)
    columns = min(len(groups), 4)
    lines = -(-len(groups) // columns)
    tallest = max(map(len, groups.values()))
    figure = _figure(2.3 * columns + 1, lines * min(max(1.6, tallest * 0.12), 8))
    picture = None
    for place, (kind, own) in enumerate(groups.items()):
        width = max(loads.experts[index] for index, _ in own)
        values = np.full((len(own), width), np.nan)
        for line, (index, _) in enumerate(own):
            row = np.asarray(loads.end[index])
            values[line, : len(row)] = np.log2(np.maximum(row * len(row), 1e-6))
        axes = figure.add_subplot(lines, columns, place + 1)
        picture = axes.imshow(values, cmap="PuOr_r", vmin=-2, vmax=2, aspect="auto", interpolation="nearest")
        with np.errstate(invalid="ignore"):
            dead = np.argwhere(values < np.log2(DEAD_BELOW))
        axes.plot(dead[:, 1], dead[:, 0], "x", color="white", markersize=3)
        axes.set_title(kind, fontsize=9)
        axes.set_xlabel("expert, × dead", fontsize=7)
        axes.tick_params(labelsize=7)
    bar = figure.colorbar(picture, ax=figure.axes, ticks=[-2, -1, 0, 1, 2], shrink=0.8)
    bar.ax.set_yticklabels(["¼ or less", "½", "even share", "twice", "4 times"], fontsize=7)
    return figure


def _matrix(values: Matrix, rows: Sequence[str], title: str, colours: str, ends: tuple[float, float | None]) -> Any:
    figure = _figure(2.5 + 0.45 * len(values[0]), 1.4 + 0.4 * len(values))
    axes = figure.add_subplot()
    picture = axes.imshow(values, cmap=colours, vmin=ends[0], vmax=ends[1], aspect="auto")
    axes.set_yticks(range(len(rows)), [str(name)[:30] for name in rows], fontsize=8)
    axes.set_xticks(range(len(values[0])))
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel("expert", fontsize=8)
    axes.set_title(title, fontsize=9, wrap=True)
    figure.colorbar(picture, ax=axes, shrink=0.8).ax.tick_params(labelsize=7)
    return figure
