"""Load the datasets listed in a run file as tasks, and mix them for training.

A task's name is, in this order: the row's own `task` column, the entry's `task`, the file's stem (without a trailing
`.train`, `.test` or the like). Entries of one task are joined: examples one after another, and as weight the mean over
their rows, so an epoch holds as many rows as the entries would have given apart.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from datasets import Dataset, concatenate_datasets

from molora.data.formats import Example, examples_of
from molora.data.rows import Row, read_rows
from molora.errors import DataError, did_you_mean

SPLIT_SUFFIXES = {".train", ".training", ".test", ".eval", ".valid", ".validation", ".dev"}


class DatasetSpec(Protocol):
    """What one entry under `datasets` in a run file says."""

    @property
    def path(self) -> str:
        """Absolute path, or hub id."""

    @property
    def name(self) -> str | None:
        """Configuration of a hub dataset."""

    @property
    def split(self) -> str | None:
        """Split to train on, `"train"` when None."""

    @property
    def task(self) -> str | None:
        """Rows to select by their `task` column, or the task's name when the rows have no such column."""

    @property
    def weight(self) -> float:
        """How often an epoch goes through the rows."""

    @property
    def max_samples(self) -> int | None:
        """Train on this many rows of the entry, drawn at random."""

    @property
    def eval_path(self) -> str | None:
        """Dataset to score on; without it and `eval_split` there is no evaluation set."""

    @property
    def eval_split(self) -> str | None:
        """Split of `eval_path`, or of `path` when there is no `eval_path`."""

    @property
    def eval_max_samples(self) -> int | None:
        """Score this many rows of the entry, drawn at random."""


@dataclass(frozen=True)
class TaskData:
    """All examples of one task.

    Attributes:
        name: Name of the task.
        weight: How often an epoch goes through `train`.
        train: Examples to learn from.
        eval: Examples to score on; empty when the run file names no evaluation data.
    """

    name: str
    weight: float
    train: list[Example]
    eval: list[Example]


def load_tasks(specs: Sequence[DatasetSpec], seed: int) -> list[TaskData]:
    """Read every listed dataset and group the examples by task, in the order the tasks first appear.

    Args:
        specs: Entries of the run file.
        seed: Decides which rows `max_samples` and `eval_max_samples` keep. A larger number keeps the same rows and
            adds others; the rows kept stay in file order.

    Raises:
        DataError: A dataset is missing, malformed, or has no rows for its task; or not all rows have `expert_scores`
            alike.
    """
    parts: dict[str, list[TaskData]] = {}
    for spec in specs:
        train = _load(spec, spec.path, spec.split, spec.max_samples, seed)
        scored = _load_eval(spec, list(train), seed)
        for name, examples in train.items():
            parts.setdefault(name, []).append(TaskData(name, spec.weight, examples, scored.get(name, [])))
    tasks = [_join(tasks) for tasks in parts.values()]
    _check_scores(tasks)
    return tasks


def mix(datasets: Sequence[Dataset], weights: Sequence[float], seed: int) -> Dataset:
    """Return one epoch over all tasks, shuffled.

    A dataset of n rows with weight w gives floor(w) copies of every row and, without repetition, a random choice of
    (w - floor(w)) * n of them, rounded half up; at least one row in all. So weight 1 is every row once, 2 twice, 0.5
    a random half. The choice of one dataset depends on the seed and its position, not on the other datasets.

    Args:
        datasets: One dataset a task, all with the same columns.
        weights: One weight a dataset, above zero.
        seed: Decides the rows chosen for the fractional part, and the order.

    Raises:
        DataError: A weight is zero, negative or not a number.
    """
    order: list[int] = []
    offset = 0
    for position, (dataset, weight) in enumerate(zip(datasets, weights, strict=True)):
        if not 0 < weight < float("inf"):
            raise DataError(f"a dataset's weight must be a number above 0, got {weight!r}.")
        rows = len(dataset)
        copies = int(weight)
        extra = int((weight - copies) * rows + 0.5)
        chosen = random.Random(f"{seed}/{position}").sample(range(rows), max(extra, 0 if copies else 1))
        order += [offset + row for row in [*range(rows)] * copies + chosen]
        offset += rows
    random.Random(seed).shuffle(order)
    return concatenate_datasets(list(datasets)).select(order)


def _load(
    spec: DatasetSpec, path: str, split: str | None, limit: int | None, seed: int, only: Sequence[str] = ()
) -> dict[str, list[Example]]:
    """Return the examples of one dataset by task; `only` names the tasks to keep when the entry names none."""
    rows = _named_rows(read_rows(path, name=spec.name, split=split), path, spec, only)
    keep = range(len(rows)) if limit is None else _draw(len(rows), limit, seed)
    tasks: dict[str, list[Example]] = {}
    for index in keep:
        name, row = rows[index]
        tasks.setdefault(name, []).extend(examples_of(row, name))
    return tasks


def _load_eval(spec: DatasetSpec, trained: list[str], seed: int) -> dict[str, list[Example]]:
    if not spec.eval_path and not spec.eval_split:
        return {}
    if not spec.eval_path and Path(spec.path).is_file():
        raise DataError(
            f"{spec.path}: a single file has no split {spec.eval_split!r}; name another file in `eval_path`."
        )
    return _load(spec, spec.eval_path or spec.path, spec.eval_split, spec.eval_max_samples, seed, only=trained)


def _draw(rows: int, limit: int, seed: int) -> list[int]:
    order = list(range(rows))
    random.Random(seed).shuffle(order)
    return sorted(order[:limit])


def _named_rows(rows: list[Row], path: str, spec: DatasetSpec, only: Sequence[str]) -> list[tuple[str, Row]]:
    """Pair each selected row with the name of its task."""
    named = [(row.values.get("task"), row) for row in rows]
    found = list(dict.fromkeys(str(name) for name, _ in named if name is not None))
    if not found:
        if len(only) > 1:
            raise DataError(f"{path}: rows need a `task` column, because the entry trains {', '.join(only)}.")
        name = only[0] if only else spec.task or _stem(path, spec.name)
        return [(name, row) for _, row in named]
    wanted = [spec.task] if spec.task else list(only) or found
    if not set(wanted) & set(found):
        hint = did_you_mean(wanted[0], found)
        raise DataError(f"{path}: no row of task {wanted[0]!r}; its tasks are {', '.join(map(repr, found))}.{hint}")
    if not spec.task and (without := next((row for name, row in named if name is None), None)):
        raise DataError(f"{without.where}: no `task`, though other rows of the file have one.")
    return [(str(name), row) for name, row in named if name is not None and str(name) in wanted]


def _stem(path: str, name: str | None) -> str:
    if name:
        return name
    stem = Path(path).stem if Path(path).is_absolute() else path.rsplit("/", 1)[-1]
    head, dot, tail = stem.rpartition(".")
    return head if head and dot + tail in SPLIT_SUFFIXES else stem


def _join(tasks: list[TaskData]) -> TaskData:
    train = [example for task in tasks for example in task.train]
    scored = [example for task in tasks for example in task.eval]
    weight = sum(task.weight * len(task.train) for task in tasks) / len(train)
    return TaskData(tasks[0].name, weight, train, scored)


def _check_scores(tasks: list[TaskData]) -> None:
    """Refuse `expert_scores` that only some rows of a run have, or that differ in number."""
    examples = [example for task in tasks for example in (*task.train, *task.eval)]
    first = next((example for example in examples if example.expert_scores), None)
    for example in examples if first else ():
        assert first is not None
        given, wanted = len(example.expert_scores), len(first.expert_scores)
        if not given:
            raise DataError(
                f"{example.where}: no `expert_scores`, though {first.where} has some; give every row of a run "
                "some, held-out ones too, or none."
            )
        if given != wanted:
            raise DataError(
                f"{example.where}: {given} `expert_scores`, though {first.where} has {wanted}; give every row one per "
                "expert."
            )
