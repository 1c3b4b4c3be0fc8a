"""The figure of a bench: differences by seed, and how routing changed. Needs matplotlib, which nothing else does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.tables import Outcome, compared


def draw(path: Path, outcomes: Sequence[Outcome], reference: str) -> str:
    """Draw the figure.

    Returns:
        Why there is none, or nothing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "matplotlib is not installed"
    base = next((outcome for outcome in outcomes if outcome.arm == reference), Outcome(reference))
    differences = [(outcome.arm, found) for outcome in outcomes if (found := compared(outcome, base)) is not None]
    routed = [outcome for outcome in outcomes if outcome.figure("routing_initial", "information_answers")]
    if not differences and not routed:
        return "there is nothing to compare yet"
    figure = Figure(figsize=(11, 1.5 + 0.45 * max(len(differences), len(routed))), layout="constrained")
    left, right = figure.subplots(1, 2)
    _differences(left, differences, reference)
    _information(right, routed)
    figure.savefig(path, dpi=150, format="png")
    return ""


def _differences(axes: Any, differences: Sequence[tuple[str, dict[str, Any]]], reference: str) -> None:
    for at, (_, found) in enumerate(differences):
        loss = found["loss"]
        axes.errorbar(loss.mean, at, xerr=loss.error, fmt="o", color="black", capsize=3)
        axes.plot(loss.values, [at] * len(loss.values), "|", color="grey", markersize=12)
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set_yticks(range(len(differences)), [name for name, _ in differences])
    axes.invert_yaxis()
    axes.set_xlabel(f"test loss minus {reference}; bar: standard error over seeds, ticks: seeds")


def _information(axes: Any, routed: Sequence[Outcome]) -> None:
    for at, outcome in enumerate(routed):
        times = [outcome.figure(when, "information_answers") for when in ("routing_initial", "routing_final")]
        values = [value.mean for value in times if value is not None]
        axes.plot(values, [at] * len(values), "-", color="grey")
        axes.plot(values[0], at, "o", color="white", markeredgecolor="black")
        axes.plot(values[1:], [at] * len(values[1:]), "o", color="black")
    axes.set_yticks(range(len(routed)), [outcome.arm for outcome in routed])
    axes.invert_yaxis()
    axes.set_xlabel("task information on answer tokens (bits); open: at initialisation")
