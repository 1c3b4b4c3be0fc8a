"""From runs to what may be said: means over seeds, errors over seeds, differences paired on rows."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from molora.evaluation.metrics import paired_error, pulls

Scored = Sequence[Mapping[str, Sequence[Any]]]
"""For each task the lists over its rows that `scoring.score` returns."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: The mean.
        error: Its standard error; None with a single seed.
        values: One a seed.
    """

    mean: float
    error: float | None
    values: tuple[float, ...]

    def text(self, digits: int = 3, sign: bool = False) -> str:
        """As a table shows it."""
        shown = f"{self.mean:{'+' if sign else ''}.{digits}f}"
        return shown if self.error is None else f"{shown} ± {self.error:.{digits}f}"


def over_seeds(values: Iterable[float]) -> Estimate:
    """Mean and standard error of one value a seed."""
    own = tuple(values)
    error = statistics.stdev(own) / math.sqrt(len(own)) if len(own) > 1 else None
    return Estimate(statistics.fmean(own), error, own)


def put_together(results: Sequence[Mapping[str, Any]]) -> list[dict[str, list[Any]]]:
    """The test rows of the runs of one arm and seed: of one run, or of one for each task."""
    tasks: list[dict[str, list[Any]]] = [{} for _ in results[0]["test"]]
    for result in results:
        for own, task in zip(tasks, result["test"], strict=True):
            for name, values in task.items():
                own[name] = own.get(name, []) + list(values)
    return tasks


def task_loss(task: Mapping[str, Sequence[float]]) -> float:
    """Mean loss of an answer token."""
    return sum(task["nll"]) / sum(task["tokens"])


def test_loss(tasks: Scored) -> float:
    """Mean over tasks of the loss of an answer token."""
    return statistics.fmean(task_loss(task) for task in tasks)


def accuracy(task: Mapping[str, Sequence[Any]]) -> float | None:
    """Share of rows whose right choice was likeliest; None if nothing is chosen."""
    chosen = [value for value in task["choice"] if value is not None]
    return statistics.fmean(chosen) if chosen else None


def exact(task: Mapping[str, Sequence[Any]]) -> float:
    """Share of rows whose answer is what the model would have written, token by token after the right ones."""
    return statistics.fmean(task["exact"])


def difference(own: Scored, other: Scored) -> list[float]:
    """By how much the mean loss of each task is larger than another run's on the same rows.

    Raises:
        ValueError: The rows are not the same.
    """
    for one, two in zip(own, other, strict=True):
        if list(one["tokens"]) != list(two["tokens"]):
            raise ValueError("the runs scored other rows, and cannot be paired.")
    return [task_loss(one) - task_loss(two) for one, two in zip(own, other, strict=True)]


def row_error(own: Scored, other: Scored) -> float:
    """Standard error over rows of the mean difference of two runs, paired: the noise of the test rows alone."""
    difference(own, other)  # refuses other rows
    errors = [paired_error(_pulls(one), _pulls(two)) or 0.0 for one, two in zip(own, other, strict=True)]
    return math.hypot(*errors) / len(own)


def _pulls(task: Mapping[str, Sequence[float]]) -> list[float]:
    """How far each row pulls the mean loss of an answer token."""
    return pulls([nll / n for nll, n in zip(task["nll"], task["tokens"], strict=True)], task["tokens"])


def best_rate(losses: Mapping[float, Sequence[float]]) -> tuple[float, bool]:
    """The learning rate with the least mean loss, and whether it is the lowest or highest of the grid.

    Args:
        losses: Validation losses by learning rate, one a seed.
    """
    best = min(losses, key=lambda rate: statistics.fmean(losses[rate]))
    return best, len(losses) > 1 and best in (min(losses), max(losses))


def by_seed(results: Iterable[Mapping[str, Any]]) -> dict[int, list[Mapping[str, Any]]]:
    """Runs by their seed, in order; several a seed if each is of one task."""
    found: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for result in results:
        found[result["settings"]["seed"]].append(result)
    return dict(sorted(found.items()))
