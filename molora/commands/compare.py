"""`molora compare`: trained adapters side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from molora.errors import ConfigError, Problem
from molora.parameters import count_by_kind
from molora.reports.data import Score
from molora.reports.folder import Folder, read_folder
from molora.reports.training import scores_of
from molora.writing import check_place, new_file

CLEAR = 2.0
"""Standard errors beyond which a difference is marked."""


@dataclass(frozen=True)
class Side:
    """One adapter of a comparison.

    Attributes:
        name: What its column is called.
        facts: What it is, in words, by name.
        scores: By task and metric.
    """

    name: str
    facts: dict[str, str]
    scores: dict[tuple[str, str], Score]


@dataclass(frozen=True)
class Difference:
    """Of one score from the first column's.

    Attributes:
        value: This one less the first one.
        error: Its standard error, were the rows independent, `None` if it is not known. Both were scored on the same
            rows as a rule, so the true one is smaller.
    """

    value: float
    error: float | None

    @property
    def is_clear(self) -> bool:
        """Whether it is beyond what chance explains."""
        return self.error is not None and abs(self.value) > CLEAR * self.error


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
        "base model": str(config.base_model_name_or_path or "not named"),
        "router": f"{config.router}, {config.selection}",
        "experts": f"{config.num_experts} of rank {config.r}",
        "trained parameters": f"{sum(count_by_kind(numbers).values()):,}",
        "loss at the end": _last(losses, "loss"),
        "held-out loss": _last(losses, "eval_loss"),
    }
    scores = {} if isinstance(found, str) else {(score.task, score.metric): score for score in found}
    return Side(name, facts, scores)


def difference(first: Score | None, other: Score | None) -> Difference | None:
    """Of two scores after training; `None` if one is missing."""
    if first is None or other is None or first.after is None or other.after is None:
        return None
    errors = [error for error in (first.errors[1], other.errors[1]) if error is not None]
    return Difference(other.after - first.after, math.hypot(*errors) if len(errors) == 2 else None)


def table(sides: Sequence[Side]) -> Table:
    """One column for each adapter; scores with standard errors, and behind them how far they are from the first's."""
    made = Table("", *(one.name for one in sides), caption=_caption(sides), caption_justify="left")
    for fact in sides[0].facts:
        cells = [one.facts[fact] for one in sides]
        if any(cells):
            made.add_row(fact, *cells)
    made.add_section()
    for key in dict.fromkeys(key for one in sides for key in one.scores):
        cells = [
            _cell(one.scores.get(key), difference(sides[0].scores.get(key), one.scores.get(key))) for one in sides
        ]
        cells[0] = _cell(sides[0].scores.get(key), None)
        made.add_row(f"{key[0]}, {key[1]}", *cells)
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
                    "standard_error": score.errors[1],
                }
                for score in one.scores.values()
            ],
        }
        for one in sides
    ]


def _cell(score: Score | None, from_first: Difference | None) -> str:
    if score is None or score.after is None:
        return "–"
    error = "" if score.errors[1] is None else f" ± {score.errors[1]:.3f}"
    moved = "" if from_first is None else f"  {from_first.value:+.3f}{'*' if from_first.is_clear else ''}"
    return f"{score.after:.3f}{error}{moved}"


def _caption(sides: Sequence[Side]) -> str:
    if not any(one.scores for one in sides):
        return "No scores lie beside these adapters: datasets of `molora train` need evaluation rows (eval_path)."
    return f"± one standard error over rows; * further from the first column than {CLEAR:g} of the difference's."


def _last(entries: Sequence[dict[str, Any]], name: str) -> str:
    value = next((entry[name] for entry in reversed(entries) if isinstance(entry.get(name), int | float)), None)
    return "" if value is None else f"{value:.4f}"


def _named(directories: Sequence[str]) -> list[tuple[str, str]]:
    """Folders by their last names, or by the whole path where those are the same."""
    last = [Path(path).absolute().name for path in directories]
    return [(path if last.count(name) > 1 else name, path) for name, path in zip(last, directories, strict=True)]
