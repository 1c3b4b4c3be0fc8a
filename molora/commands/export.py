"""`molora export` and `molora merge`: write an adapter in a form that needs no molora."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from molora.adapters import read_adapter_config
from molora.commands.needs import reads_scores, reads_tasks, scores_per_row, task_id
from molora.errors import ConfigError, Problem, did_you_mean
from molora.export.job import ExportReport, export_adapter
from molora.export.report import energy_table, quality_table
from molora.report import known_tasks


def run(
    directory: str,
    out: str,
    *,
    target: str,
    calibrate: Sequence[str] | None = None,
    task: str | None = None,
    expert_scores: Sequence[float] | None = None,
    **options: Any,
) -> int:
    """Export an adapter, print what it costs, and say how to load the result.

    Args:
        directory: Folder of the adapter.
        out: New folder.
        target: What to write, as in `molora.export.options.ExportOptions`.
        calibrate: Files of rows to fit to; empty for the data of the run, `None` to allow exact exports only.
        task: Name or id of the task to export for.
        expert_scores: Numbers to export for.
        **options: Further fields of `ExportOptions`.

    Raises:
        ConfigError: If the options contradict each other or the adapter.
        MergeError: If no exact form exists and calibration was not asked for.
        WriteError: If `out` cannot be written.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("molora").setLevel(logging.INFO)
    report = export_adapter(
        directory,
        out,
        target=target,
        calibrate=None if calibrate is None else tuple(calibrate),
        task=_task(directory, task),
        expert_scores=_scores(directory, expert_scores),
        **options,
    )
    _show(report, out)
    return 0


def _task(directory: str, task: str | None) -> int | None:
    if task is None:
        return None
    config, names = read_adapter_config(directory), known_tasks(directory)
    if not reads_tasks(config):
        raise _refusal("--task", "this adapter's routing reads no task; leave it out.")
    index = task_id(task, names, config.num_tasks or 1)
    if index is None:
        known = (
            ", ".join(f"{place} {name}" for place, name in enumerate(names)) or f"0 to {(config.num_tasks or 1) - 1}"
        )
        raise _refusal("--task", f"there is no task {task!r}. Known are {known}.{did_you_mean(task, names)}")
    return index


def _scores(directory: str, scores: Sequence[float] | None) -> tuple[float, ...] | None:
    if scores is None:
        return None
    config = read_adapter_config(directory)
    if not reads_scores(config):
        raise _refusal("--scores", "this adapter's routing reads no scores; leave them out.")
    if [len(scores)] != scores_per_row(config):
        numbers = " or ".join(map(str, scores_per_row(config)))
        raise _refusal("--scores", f"the routing reads {numbers} numbers, one per expert; got {len(scores)}.")
    return tuple(scores)


def _refusal(field: str, message: str) -> ConfigError:
    return ConfigError([Problem(field, message)], "cannot export like this")


def _show(report: ExportReport, out: str) -> None:
    console = Console()
    if report.quality:
        console.print("\nWhat the export costs, on rows that nothing was fitted to")
        console.print(quality_table(report))
        scores = _score_table(report)
        if scores is not None:
            console.print(scores)
    if report.calibration is not None and any(fit.energy for fit in report.calibration.linears):
        console.print("\nWhat lower ranks would keep (--rank)")
        console.print(energy_table(report.calibration))
    for note in report.notes:
        console.print("\n" + note, markup=False, highlight=False, soft_wrap=True)
    rank = f", rank {report.rank}" if report.rank else ""
    said = f"\nWritten to {out}: {report.target}, {report.method}{rank}. README.md in it says how to load it."
    console.print(said, markup=False, highlight=False, soft_wrap=True)


def _score_table(report: ExportReport) -> Table | None:
    """Every task's scores, one column a form of the model."""
    keys = list(dict.fromkeys((s.task, s.metric) for one in report.quality.values() for s in one.scores))
    if not keys:
        return None
    names = [name for name, one in report.quality.items() if one.scores]
    table = Table("task", "metric")
    for name in names:
        table.add_column(name, justify="right")
    for task, metric in keys:
        values = []
        for name in names:
            found = [s.value for s in report.quality[name].scores if (s.task, s.metric) == (task, metric)]
            values.append(f"{found[0]:.3f}" if found else "-")
        table.add_row(task, metric, *values)
    return table
