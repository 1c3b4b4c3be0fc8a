"""One metric of one task, with its standard error, and two of them side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from molora.evaluation.metrics import paired_error, perplexity, pulls, standard_error, weighted_mean

LOWER_IS_BETTER = ("perplexity",)

HEADLINES = ("accuracy", "exact_match", "token_f1")
"""Metrics whose mean stands for a task; the others see the same answers in another way."""


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task.

    Attributes:
        task: Name of the task.
        metric: `accuracy`, `accuracy_norm`, `exact_match`, `token_f1` or `perplexity`.
        value: The metric, a share between 0 and 1 except for `perplexity`.
        count: Rows scored.
        stderr: Standard error over rows; `None` with one row, or if it is not known.
        rows: What each row contributes, in the order of the task's rows: 0 or 1, its F1, or for `perplexity` its mean
            negative log-likelihood a token. Empty if it is not known.
        weights: How much each row counts: 1, or its tokens. Empty like `rows`.
    """

    task: str
    metric: str
    value: float
    count: int
    stderr: float | None = field(default=None, compare=False)
    rows: tuple[float, ...] = field(default=(), repr=False, compare=False)
    weights: tuple[int, ...] = field(default=(), repr=False, compare=False)

    @classmethod
    def of_rows(cls, task: str, metric: str, rows: Sequence[float], weights: Sequence[int] | None = None) -> TaskScore:
        """Sum rows up.

        Args:
            task: Name of the task.
            metric: Name of the metric.
            rows: As the attribute; at least one.
            weights: Likewise; `None` for rows that count alike.
        """
        counted = tuple(weights) if weights is not None else (1,) * len(rows)
        mean = weighted_mean(rows, counted)
        value = perplexity(mean) if metric == "perplexity" else mean
        score = cls(task, metric, value, len(rows), None, tuple(rows), counted)
        error = standard_error(score.pulls()) if math.isfinite(value) else None
        return cls(task, metric, value, len(rows), error, score.rows, counted)

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> TaskScore:
        """Read what `as_json` wrote; further entries, of a later molora, are left out."""
        known: dict[str, Any] = {name: entry.get(name) for name in ("task", "metric", "value", "count", "stderr")}
        if known["value"] is None:  # JSON has no infinity
            known["value"] = math.inf
        return cls(**known)

    def as_json(self) -> dict[str, Any]:
        """Everything but the single rows; a perplexity beyond all numbers is `None`."""
        value = self.value if math.isfinite(self.value) else None
        return {"task": self.task, "metric": self.metric, "value": value, "count": self.count, "stderr": self.stderr}

    def pulls(self) -> list[float]:
        """How far each row pulls the value; see `metrics.pulls`."""
        return pulls(self.rows, self.weights, self.value if self.metric == "perplexity" else 1.0)


@dataclass(frozen=True)
class Change:
    """From one score to another.

    Attributes:
        value: The later one less the earlier one.
        stderr: Its standard error, paired on rows if both scored the same ones, else as of independent rows; `None` if
            it is not known.
        better: Whether the later one is better.
    """

    value: float
    stderr: float | None
    better: bool

    @classmethod
    def between(cls, before: TaskScore, after: TaskScore, same_rows: bool = True) -> Change:
        """Compare two scores of one task and metric.

        Args:
            before: The earlier one.
            after: The later one.
            same_rows: Whether both scored the same rows, in the same order.
        """
        value = after.value - before.value
        better = value < 0 if after.metric in LOWER_IS_BETTER else value > 0
        finite = math.isfinite(before.value) and math.isfinite(after.value)
        if same_rows and finite and before.rows and before.weights == after.weights:
            return cls(value, paired_error(after.pulls(), before.pulls()), better)
        errors = [before.stderr, after.stderr]
        known = [error for error in errors if error is not None]
        return cls(value, math.hypot(*known) if len(known) == 2 else None, better)


def score_table(before: Sequence[TaskScore], after: Sequence[TaskScore]) -> Table:
    """Return a table of both scores and their difference, one line a task and metric of `after`.

    ± is one standard error over rows, that of a change paired on them where single rows are known.
    """
    earlier = {(score.task, score.metric): score for score in before}
    # Narrow, and numbers whole: all of it fits into 80 columns.
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("task", overflow="fold")
    table.add_column("metric", overflow="fold")
    for name in ("rows", "before", "after", "change") if before else ("rows", "value"):
        table.add_column(name, justify="right", no_wrap=True)
    for score in after:
        cells = [escape(score.task), score.metric, str(score.count)]
        if not before:
            table.add_row(*cells, _tight(score.value, score.stderr))
            continue
        old = earlier.get((score.task, score.metric))
        change = Change.between(old, score) if old else None
        table.add_row(
            *cells,
            _tight(old.value, old.stderr) if old else "-",
            _tight(score.value, score.stderr),
            _coloured(change) if change else "-",
        )
    return table


def with_error(value: float, stderr: float | None, sign: str = "") -> str:
    """A number and its standard error, if it has one."""
    digits = decimals(value, stderr)
    return f"{value:{sign}.{digits}f}" + ("" if stderr is None else f" ± {stderr:.{digits}f}")


def decimals(*values: float | None) -> int:
    """Decimals to show numbers side by side with: three below 10, fewer of larger ones."""
    largest = max((abs(value) for value in values if value is not None and math.isfinite(value)), default=0.0)
    return sum(largest < limit for limit in (10, 100, 1000))


def _coloured(change: Change) -> str:
    colour = "green" if change.better else "red" if change.value else "dim"
    return f"[{colour}]{_tight(change.value, change.stderr, '+')}[/]"


def _tight(value: float, stderr: float | None, sign: str = "") -> str:
    return with_error(value, stderr, sign).replace(" ", "")
