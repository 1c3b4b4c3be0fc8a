"""What an evaluation found: scores, as a table and as a document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich.table import Table

PACKAGES = ("molora", "lm_eval", "torch", "transformers", "peft", "datasets")
"""Packages whose versions belong to a score."""


@dataclass(frozen=True)
class Score:
    """One metric of one task.

    Attributes:
        task: Name of the task or group.
        metric: Name of the metric.
        filter: How answers were read; `"none"` if as they are.
        value: The metric.
        stderr: Its standard error, if it has one.
        higher_is_better: Whether it is a merit.
        count: Rows scored.
    """

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    higher_is_better: bool | None
    count: int | None


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        scores: One a task, metric and filter.
        task_versions: Version of each task.
        shots: Examples that the prompts of each task show.
        limit: Rows of each task at most; `None` for all.
        versions: Versions of the packages.
    """

    scores: tuple[Score, ...]
    task_versions: Mapping[str, Any]
    shots: Mapping[str, Any]
    limit: int | None
    versions: Mapping[str, str]

    def value(self, task: str, metric: str) -> float:
        """One score.

        Raises:
            KeyError: If there is none such.
        """
        for score in self.scores:
            if (score.task, score.metric) == (task, metric):
                return score.value
        raise KeyError(f"there is no {metric} of {task}")

    def document(self, **more: Any) -> dict[str, Any]:
        """Everything as data for JSON.

        Args:
            **more: Further entries, which come first.
        """
        return {
            **more,
            "limit": self.limit,
            "scores": [asdict(score) for score in self.scores],
            "task_versions": dict(self.task_versions),
            "num_fewshot": dict(self.shots),
            "versions": dict(self.versions),
        }

    def table(self) -> Table:
        """Lay the scores out for a terminal."""
        filtered = any(score.filter != "none" for score in self.scores)
        table = Table("task", "metric", *(["filter"] if filtered else []))
        for name in ("rows", "value", "stderr"):
            table.add_column(name, justify="right")
        for score in self.scores:
            arrow = {True: " ↑", False: " ↓", None: ""}[score.higher_is_better]
            stderr = "-" if score.stderr is None else f"{score.stderr:.4f}"
            table.add_row(
                score.task,
                score.metric + arrow,
                *([score.filter] if filtered else []),
                "-" if score.count is None else str(score.count),
                f"{score.value:.4f}",
                stderr,
            )
        return table


def scores_of(results: Mapping[str, Any], limit: int | None) -> Evaluation:
    """Read what lm-evaluation-harness returns.

    Args:
        results: Its results, with keys such as `acc,none` and `acc_stderr,none` for each task.
        limit: Rows of each task at most.
    """
    scores = [
        Score(
            task,
            metric,
            filter_name,
            float(value),
            _number(values.get(f"{metric}_stderr,{filter_name}")),
            results["higher_is_better"].get(task, {}).get(metric),
            results["n-samples"].get(task, {}).get("effective"),
        )
        for task, values in results["results"].items()
        for metric, filter_name, value in _metrics(values)
    ]
    return Evaluation(tuple(scores), results["versions"], results["n-shot"], limit, versions())


def versions() -> dict[str, str]:
    """Versions of the packages that a score depends on, of those that are installed."""
    return {name: found for name in PACKAGES if (found := _version(name))}


def _metrics(values: Mapping[str, Any]) -> Sequence[tuple[str, str, Any]]:
    keys = [key for key, value in values.items() if "," in key and _number(value) is not None]
    split = [(*key.split(",", 1), values[key]) for key in keys]
    return [(metric, name, value) for metric, name, value in split if not metric.endswith("_stderr")]


def _number(value: Any) -> float | None:
    """A number, or `None` for what the harness writes where there is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
