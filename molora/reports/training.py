"""What a training logged and kept: scores, curves, and the load of experts over its steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from molora.evaluation import TaskScore
from molora.evaluation.record import read_rows_file, with_rows
from molora.reports.data import Curve, Loads, Matrix, Score
from molora.reports.folder import Folder, listed
from molora.reports.names import in_order

MOST_STEPS = 24
"""Steps of the training that a page shows; of more, some evenly apart."""

_COUNTS = ("step", "epoch", "total_flos", "num_tokens", "num_input_tokens_seen", "train_loss")
_RATES = ("runtime", "per_second")
_TITLES = {
    "loss": "loss",
    "mean_token_accuracy": "token accuracy",
    "entropy": "entropy of predictions, nats",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
    "molora/experts_per_token": "experts per token",
    "molora/load_max": "largest load",
    "molora/load_cv": "variation of load",
    "molora/dead_experts": "dead experts per linear",
    "molora/entropy": "entropy of routers, nats",
    "molora/threshold_mean": "threshold",
    "molora/null_share": "share of null experts",
}
"""By name in the log; in this order, and others behind them."""
_SHARES = ("accuracy", "exact_match")
_BETWEEN_0_AND_1 = (*_SHARES, "accuracy_norm", "token_f1")


def scores_of(folder: Folder) -> list[Score] | str:
    """Scores before and after training, with standard errors."""
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for when in ("before", "after"):
        for entry in listed(folder.record, when):
            if isinstance(entry, dict) and {"task", "metric"} <= set(entry) and _is_number(entry.get("value")):
                found.setdefault((str(entry["task"]), str(entry["metric"])), {})[when] = entry
    if not found:
        return (
            "No scores lie beside the adapter. `molora train` writes them if its datasets name evaluation rows "
            "(`eval_path` or `eval_split`); `molora eval DIR --data FILE` scores an adapter that is trained."
        )
    return [_score(task, metric, both) for (task, metric), both in found.items()]


def task_scores(folder: Folder, when: str) -> list[TaskScore]:
    """Scores of `before` or `after` training, with what each row contributed where that lies beside the adapter."""
    known = {"task", "metric", "value", "count"}
    entries = [one for one in listed(folder.record, when) if isinstance(one, dict) and known <= set(one)]
    return with_rows([TaskScore.from_json(one) for one in entries], read_rows_file(folder.path), when)


def _score(task: str, metric: str, both: Mapping[str, Mapping[str, Any]]) -> Score:
    values = [both[when]["value"] if when in both else None for when in ("before", "after")]
    errors = [_error(metric, both[when]) if when in both else None for when in ("before", "after")]
    rows = max(int(entry.get("count", 0)) for entry in both.values())
    own = any(_own_error(entry) is not None for entry in both.values())
    bound = not own and metric in _BETWEEN_0_AND_1 and metric not in _SHARES
    change = both.get("after", {}).get("change_stderr")
    known = change if isinstance(change, float) else None
    return Score(task, metric, rows, values[0], values[1], (errors[0], errors[1]), bound, known)


def _own_error(entry: Mapping[str, Any]) -> float | None:
    return next((entry[name] for name in ("stderr", "standard_error", "error") if name in entry), None)


def _error(metric: str, entry: Mapping[str, Any]) -> float | None:
    """The standard error that the file states, else what follows from a mean of values between 0 and 1."""
    own, value, rows = _own_error(entry), entry["value"], int(entry.get("count", 0))
    if own is not None:
        return float(own)
    known = metric in _BETWEEN_0_AND_1 and rows > 1 and 0 <= value <= 1
    return math.sqrt(value * (1 - value) / (rows - 1)) if known else None


def curves_of(folder: Folder) -> list[Curve] | str:
    """What the training logged, metric by metric, those of routing last."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for entry in listed(folder.state, "log_history"):
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            for name, value in entry.items():
                base = name.removeprefix("eval_")
                if _is_metric(base, value):
                    series = found.setdefault(base, {}).setdefault("train" if base == name else "held-out", [])
                    series.append((entry["step"], value))
    if not found:
        return (
            "No log of the training lies beside the adapter. `molora train` leaves `trainer_state.json` in its "
            "`output_dir` and in every checkpoint; give that folder."
        )
    order = [*(name for name in _TITLES if name in found), *sorted(set(found) - set(_TITLES))]
    curves = [Curve(_title(name), name.startswith("molora/"), found[name]) for name in order]
    return sorted(curves, key=lambda curve: curve.routing)


def _is_metric(name: str, value: Any) -> bool:
    return _is_number(value) and name not in _COUNTS and not name.endswith(_RATES)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _title(name: str) -> str:
    return _TITLES.get(name) or name.removeprefix("molora/").replace("_", " ")


def loads_of(folder: Folder, measured: Mapping[str, Sequence[float]] | None, origin: str) -> Loads | str:
    """Load of experts over the training and at the end.

    Args:
        folder: The adapter.
        measured: Load of each linear's experts on rows that were looked at; `None` if none were.
        origin: What these rows are.
    """
    names, entries = folder.history
    entries = _some([entry for entry in entries if _fits(entry, len(names))], MOST_STEPS)
    if not entries and not measured:
        return (
            "How often each expert is used is not known: no checkpoint's `trainer_state.json` lies here, and no rows "
            "were looked at. Give `--data FILE`, or the `output_dir` of `molora train`."
        )
    modules = sorted({*names, *(measured or {})}, key=in_order)
    experts = [folder.adapter.plan(name).num_experts for name in modules]
    place = {name: index for index, name in enumerate(names)}
    over_time = [
        [_row(entry["load"], place.get(name), number) for name, number in zip(modules, experts, strict=True)]
        for entry in entries
    ]
    if measured:
        end: Matrix = [list(measured.get(name, ()))[:number] for name, number in zip(modules, experts, strict=True)]
    else:
        end, origin = over_time[-1], f"the training's last steps, up to step {entries[-1]['step']}"
    return Loads(modules, experts, end, origin, [int(entry["step"]) for entry in entries], over_time)


def _fits(entry: Mapping[str, Any], linears: int) -> bool:
    load = entry.get("load")
    return isinstance(load, list) and len(load) == linears and isinstance(entry.get("step"), int)


def _row(loads: Sequence[Any], index: int | None, number: int) -> list[float]:
    row = None if index is None else loads[index]
    return [float(value) for value in row[:number]] if isinstance(row, list) else []


def _some(entries: list[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    """At most so many, evenly apart, the last among them."""
    if len(entries) <= number:
        return entries
    return [entries[round(index * (len(entries) - 1) / (number - 1))] for index in range(number)]
