"""`molora compare`: trained adapters side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from molora.errors import ConfigError, Problem
from molora.evaluation import with_error
from molora.evaluation.metrics import paired_error
from molora.evaluation.record import digests_of, read_rows_file
from molora.parameters import count_by_kind
from molora.reports.about import base_name
from molora.reports.data import Score
from molora.reports.folder import Folder, read_folder
from molora.reports.summary import scored
from molora.reports.training import scores_of, task_scores
from molora.writing import check_place, new_file

CLEAR = 2.0
"""Standard errors beyond which a difference is marked."""

FEW = 10
"""With fewer rows a standard error is too uncertain to mark anything by it."""

_NOISE = 1e-4
"""Differences below this are of rounding, whatever the rows say."""


@dataclass(frozen=True)
class Side:
    """One adapter of a comparison.

    Attributes:
        name: What its column is called.
        facts: What it is, in words, by name.
        scores: By task and metric.
        pulls: How far each row pulls each score, where that lies beside the adapter.
        digests: By task, what its rows were.
    """

    name: str
    facts: dict[str, str]
    scores: dict[tuple[str, str], Score]
    pulls: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """Of one score from the first column's.

    Attributes:
        value: This one less the first one.
        error: Its standard error, `None` if it is not known: paired on rows if it is known that both scored the same
            ones, else as of independent rows, which is too large if they were the same.
        paired: Which of the two.
        rows: Rows scored by the one that scored fewer.
    """

    value: float
    error: float | None
    paired: bool = False
    rows: int = 0

    @property
    def is_clear(self) -> bool:
        """Whether it is beyond what chance explains."""
        return self.error is not None and self.rows >= FEW and abs(self.value) > max(CLEAR * self.error, _NOISE)


def run(directories: Sequence[str], *, output: str | None = None) -> int:
    """Print a table of runs.

    Args:
        directories: Folders of adapters or runs; the others are compared with the first.
        output: File to write the numbers to, as JSON.

    Raises:
        ConfigError: If a folder holds no usable adapter, or there is only one.
        WriteError: If the file cannot be written.
    """
    if len(directories) < 2:
        raise ConfigError([Problem("", "give two folders or more.")], "nothing to compare with")
    if output is not None:
        check_place(output)
    sides = [side(name, read_folder(path)) for name, path in _named(directories)]
    Console().print(table(sides))
    if output is not None:
        with new_file(output) as partial:
            partial.write_text(json.dumps(as_json(sides), indent=2) + "\n", encoding="utf-8")
    return 0


def side(name: str, folder: Folder) -> Side:
    """What a folder says of itself."""
    config, found = folder.adapter.config, scores_of(folder)
    numbers = ((key, tensor) for key, tensor in folder.adapter.tensors.items() if tensor.is_floating_point())
    losses = [entry for entry in folder.state.get("log_history", []) if isinstance(entry, dict)]
    facts = {
        "base model": base_name(config),
        "router": f"{config.router}, {config.selection}",
        "experts": f"{config.num_experts} of rank {config.r}",
        "trained parameters": f"{sum(count_by_kind(numbers).values()):,}",
        "loss at the end": _last(losses, "loss"),
        "held-out loss": _last(losses, "eval_loss"),
    }
    scores = {} if isinstance(found, str) else {(score.task, score.metric): score for score in found}
    pulls = {(one.task, one.metric): one.pulls() for one in task_scores(folder, "after") if one.rows}
    return Side(name, facts, scores, pulls, digests_of(read_rows_file(folder.path)))


def difference(first: Side, other: Side, key: tuple[str, str]) -> Difference | None:
    """Of two scores after training, by task and metric; `None` if one is missing."""
    one, two = first.scores.get(key), other.scores.get(key)
    if one is None or two is None or one.after is None or two.after is None:
        return None
    value, rows = two.after - one.after, min(one.rows, two.rows)
    digests, pulls = (
        [side.digests.get(key[0]) for side in (first, other)],
        [first.pulls.get(key), other.pulls.get(key)],
    )
    if digests[0] == digests[1] is not None and pulls[0] and pulls[1] and len(pulls[0]) == len(pulls[1]):
        return Difference(value, paired_error(pulls[1], pulls[0]), paired=True, rows=rows)
    errors = [error for error in (one.errors[1], two.errors[1]) if error is not None]
    return Difference(value, math.hypot(*errors) if len(errors) == 2 else None, rows=rows)


def table(sides: Sequence[Side]) -> Table:
    """One column for each adapter; scores with standard errors, and behind them how far they are from the first's."""
    made = Table("", *(escape(one.name) for one in sides), caption=_caption(sides), caption_justify="left")
    for fact in sides[0].facts:
        cells = [escape(one.facts[fact]) for one in sides]
        if any(cells):
            made.add_row(fact, *cells)
    made.add_section()
    for key in dict.fromkeys(key for one in sides for key in one.scores):
        moved = [None, *(difference(sides[0], one, key) for one in sides[1:])]
        cells = [_cell(one.scores.get(key), by) for one, by in zip(sides, moved, strict=True)]
        made.add_row(escape(f"{key[0]}, {key[1]}"), *cells)
    return made


def as_json(sides: Sequence[Side]) -> list[dict[str, Any]]:
    """The same for programs."""
    return [
        {
            "name": one.name,
            **one.facts,
            "scores": [
                {
                    "task": score.task,
                    "metric": score.metric,
                    "rows": score.rows,
                    "before": score.before,
                    "after": score.after,
                    "stderr": score.errors[1],
                    "stderr_is_bound": score.bound,
                    **_from_first(difference(sides[0], one, key) if one is not sides[0] else None),
                }
                for key, score in one.scores.items()
            ],
        }
        for one in sides
    ]


def _cell(score: Score | None, from_first: Difference | None) -> str:
    if score is None or score.after is None:
        return "–"
    shown = scored(score.after, score.errors[1], score.bound)
    if from_first is None:
        return shown
    moved = with_error(from_first.value, from_first.error if from_first.paired else None, "+")
    return f"{shown}  {moved}{'*' if from_first.is_clear else ''}"


def _from_first(found: Difference | None) -> dict[str, Any]:
    if found is None:
        return {}
    return {"difference": found.value, "difference_stderr": found.error, "paired": found.paired}


def _caption(sides: Sequence[Side]) -> str:
    if not any(one.scores for one in sides):
        return "No scores lie beside these adapters: datasets of `molora train` need evaluation rows (eval_path)."
    return (
        f"± one standard error over rows, ≤ at most that; * further from the first column than {CLEAR:g} of the "
        f"difference's, with {FEW} rows or more. It is paired on rows, and shown, where both scored the same ones."
    )


def _last(entries: Sequence[dict[str, Any]], name: str) -> str:
    value = next((entry[name] for entry in reversed(entries) if isinstance(entry.get(name), int | float)), None)
    return "" if value is None else f"{value:.4f}"


def _named(directories: Sequence[str]) -> list[tuple[str, str]]:
    """Folders by their last names, or by the whole path where those are the same."""
    last = [Path(path).absolute().name for path in directories]
    return [(path if last.count(name) > 1 else name, path) for name, path in zip(last, directories, strict=True)]
