"""Scores of a run as files: sums for people, single rows for comparing runs on the same rows."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeGuard

from molora.data.mixture import TaskData
from molora.evaluation.scores import Change, TaskScore

ROWS_FILE = "molora_rows.json"
"""Written beside the adapter: what each row contributed to each score, and which rows they were."""


def as_entries(scores: Sequence[TaskScore], before: Sequence[TaskScore] = ()) -> list[dict[str, Any]]:
    """Scores for JSON, with the standard error of the change where there are earlier ones: `change_stderr`."""
    earlier = {(score.task, score.metric): score for score in before}
    entries = []
    for score in scores:
        old = earlier.get((score.task, score.metric))
        change = {"change_stderr": _finite(Change.between(old, score).stderr)} if old is not None else {}
        entries.append(score.as_json() | change)
    return entries


def rows_document(tasks: Iterable[TaskData], **scores: Sequence[TaskScore]) -> dict[str, Any]:
    """What each row contributed, for JSON.

    Args:
        tasks: Their evaluation rows were scored.
        **scores: By when they were taken: `before`, `after`.
    """
    return {
        "digests": {task.name: digest(task) for task in tasks if task.eval},
        **{
            when: [{**_key(one), "rows": [_finite(v) for v in one.rows], "weights": one.weights} for one in found]
            for when, found in scores.items()
        },
    }


def write_rows(path: Path, tasks: Iterable[TaskData], **scores: Sequence[TaskScore]) -> None:
    """Write `rows_document`, one line a score."""
    document = rows_document(tasks, **scores)
    whens = [
        f"{json.dumps(when)}: [\n" + ",\n".join(json.dumps(entry) for entry in document[when]) + "\n]"
        for when in scores
    ]
    head = f'"digests": {json.dumps(document["digests"])}'
    path.write_text("{" + ",\n".join([head, *whens]) + "}\n", encoding="utf-8")


def read_rows_file(folder: Path) -> dict[str, Any]:
    """What `write_rows` wrote into a folder; empty if it is not there or damaged, as the sums are elsewhere."""
    try:
        found = json.loads((folder / ROWS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def with_rows(scores: Sequence[TaskScore], document: Mapping[str, Any], when: str) -> list[TaskScore]:
    """Give scores their single rows back, where the document has as many of them as were scored."""
    entries = document.get(when)
    entries = [one for one in entries if isinstance(one, dict)] if isinstance(entries, list) else []
    found = {(one.get("task"), one.get("metric")): one for one in entries}
    return [_with(score, found.get((score.task, score.metric), {})) for score in scores]


def digests_of(document: Mapping[str, Any]) -> dict[str, str]:
    """Which rows a document is about, by task."""
    found = document.get("digests")
    return found if isinstance(found, dict) else {}


def digest(task: TaskData) -> str:
    """Changes with any evaluation row of a task, and with their order."""
    total = hashlib.sha256()
    for example in task.eval:
        told = {name: value for name, value in asdict(example).items() if name not in ("where", "task")}
        total.update(json.dumps(told, sort_keys=True, ensure_ascii=False).encode())
    return total.hexdigest()[:16]


def _key(score: TaskScore) -> dict[str, str]:
    return {"task": score.task, "metric": score.metric}


def _with(score: TaskScore, entry: Mapping[str, Any]) -> TaskScore:
    rows, weights = entry.get("rows"), entry.get("weights")
    if not (_are_numbers(rows) and _are_numbers(weights) and len(rows) == len(weights) == score.count):
        return score
    return replace(score, rows=tuple(rows), weights=tuple(map(int, weights))) if min(weights) > 0 else score


def _are_numbers(values: Any) -> TypeGuard[list[float]]:
    return isinstance(values, list) and all(isinstance(one, int | float) and math.isfinite(one) for one in values)


def _finite(value: float | None) -> float | None:
    """For JSON, which has no infinity."""
    return value if value is not None and math.isfinite(value) else None
