"""`molora eval`: score an adapter, routed or exported, or a model: on rows, and on tasks of lm-evaluation-harness."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from rich.console import Console

from molora.commands.needs import reads_scores, reads_tasks, scores_per_row, task_id
from molora.commands.session import read_tasks
from molora.config import MoLoraConfig
from molora.data import TaskData, load_tasks
from molora.errors import ConfigError, Problem, did_you_mean
from molora.evaluation import TaskScore, score_table, score_tasks
from molora.evaluation.needs import check_routing
from molora.evaluation.record import as_entries
from molora.harness import check_installed, evaluate
from molora.harness.results import versions
from molora.loaded import load_any, read_any_config, read_run, run_file_of
from molora.report import known_tasks
from molora.runfile import load_run_file
from molora.runfile.arguments import DatasetArguments
from molora.writing import check_place, new_file

LONGEST = 64
"""Tokens of an answer where no run says it."""


def run(
    directory: str,
    *,
    tasks: Sequence[str] = (),
    include_path: str | None = None,
    data: Sequence[str] = (),
    limit: int | None = None,
    batch_size: int = 8,
    base_model: str | None = None,
    base: bool = True,
    max_new_tokens: int | None = None,
    task: str | None = None,
    scores: Sequence[float] | None = None,
    output: str | None = None,
) -> int:
    """Print the scores of a model, and write them to a file if one is named.

    Args:
        directory: Folder of a molora adapter, of any adapter of PEFT, or of a model.
        tasks: Names of tasks, groups or tags of lm-evaluation-harness; `*` stands for anything.
        include_path: Folder with further task files.
        data: Files of rows as `molora train` reads them. Without them and `tasks`, the evaluation rows of the run
            that made the adapter.
        limit: Rows of each task.
        batch_size: Rows of a forward pass.
        base_model: Base model to use instead of the one named in the adapter.
        base: Whether to score rows without the adapter too.
        max_new_tokens: Longest answer to a row; `None` for that of the run that made the adapter, or 64.
        task: Name or id of the task of all rows, for adapters whose routing reads it.
        scores: A number per expert for rows that bring none, likewise.
        output: File for the scores, as JSON; nothing is overwritten.

    Raises:
        ConfigError: If there is nothing to evaluate, or something asked for is impossible.
        MoloraError: If the model or a task cannot be loaded, or the file not be written.
        DataError: If a file of rows cannot be used.
    """
    if output is not None:
        check_place(output)
    if tasks:
        check_installed()
    config = read_any_config(directory)
    given = _routing_inputs(directory, config, task, scores)
    rows, longest = _rows(directory, data) if data or not tasks else ([], LONGEST)
    longest = max_new_tokens or longest
    rows = [replace(one, eval=one.eval[:limit]) for one in rows]
    if isinstance(config, MoLoraConfig) and reads_tasks(config) and task is None:
        given["task_ids"] = _ids_of_rows(directory, config, tasks, rows)
    model, tokenizer = load_any(directory, config, base_model)
    document: dict[str, Any] = {
        "model": str(Path(directory).absolute()),
        "kind": _kind(config),
        "batch_size": batch_size,
        "limit": limit,
        "versions": versions(),
    }
    console = Console()
    if rows:
        before, after = _score_rows(model, tokenizer, rows, given, batch_size, longest, base)
        console.print(score_table(before, after))
        document |= {"before": as_entries(before), "scores": as_entries(after, before)}
    if tasks:
        given |= {"include_path": include_path, "limit": limit, "batch_size": batch_size}
        found = evaluate(model, tokenizer, tasks, **given)
        console.print(found.table())
        document["harness"] = found.document()
    if output is not None:
        with new_file(output) as path:
            path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        console.print(f"The scores are in {output}.", markup=False, highlight=False, soft_wrap=True)
    return 0


def _score_rows(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[TaskData],
    given: Mapping[str, Any],
    batch_size: int,
    longest: int,
    base: bool,
) -> tuple[list[TaskScore], list[TaskScore]]:
    """Score rows without the adapter, if there is one and it is asked for, and with it."""
    ids, own = given.get("task_ids"), given.get("expert_scores", ())
    common, by_name = (ids, {}) if isinstance(ids, int) else (None, ids or {})
    check_routing(model, [], tasks, common, by_name, own)
    filled = [
        replace(task, eval=[replace(row, expert_scores=row.expert_scores or own) for row in task.eval])
        for task in tasks
    ]
    places = [by_name.get(task.name, common or 0) for task in tasks]

    def scored() -> list[TaskScore]:
        return score_tasks(model, tokenizer, filled, batch_size=batch_size, max_new_tokens=longest, task_ids=places)

    before: list[TaskScore] = []
    if base and isinstance(model, PeftModel):
        with model.disable_adapter():
            before = scored()
    return before, scored()


def _kind(config: PeftConfig | None) -> str:
    return "model" if config is None else str(getattr(config.peft_type, "value", config.peft_type))


def _rows(directory: str, files: Sequence[str]) -> tuple[list[TaskData], int]:
    """Return the rows to score by task, and the longest answer to them in tokens."""
    if files:
        specs = [DatasetArguments(path=str(Path(file).expanduser().absolute())) for file in files]
        run = read_run(directory)
        longest = run.evaluation.eval_max_new_tokens if run is not None else LONGEST
        return [TaskData(task.name, task.weight, [], task.train) for task in load_tasks(specs, seed=0)], longest
    file = run_file_of(directory)
    if file is None:
        message = f"{directory} does not come with a run file; name tasks with --tasks, or rows with --data."
        raise ConfigError([Problem("", message)], "there is nothing to evaluate")
    run = load_run_file(file)
    tasks = read_tasks(run)
    if not any(task.eval for task in tasks):
        message = "its datasets have no evaluation rows; name tasks with --tasks, or rows with --data."
        raise ConfigError([Problem("datasets", message, str(file))], "there is nothing to evaluate")
    return tasks, run.evaluation.eval_max_new_tokens


def _routing_inputs(
    directory: str, config: PeftConfig | None, task: str | None, scores: Sequence[float] | None
) -> dict[str, Any]:
    """What is given for the routing of all rows."""
    given: dict[str, Any] = {}
    problems = []
    mixture = config if isinstance(config, MoLoraConfig) else None
    if task is not None and (mixture is None or not reads_tasks(mixture)):
        problems.append(Problem("--task", "this model's routing reads no task; leave it out."))
    elif task is not None and mixture is not None:
        names, number = known_tasks(directory), mixture.num_tasks or 1
        given["task_ids"] = task_id(task, names, number)
        if given["task_ids"] is None:
            message = f"there is no task {task!r}. Known are {_listed(names, number)}.{did_you_mean(task, names)}"
            problems.append(Problem("--task", message))
    if scores is not None:
        wanted = scores_per_row(mixture) if mixture is not None and reads_scores(mixture) else []
        if not wanted:
            problems.append(Problem("--scores", "this model's routing reads no scores; leave them out."))
        elif [len(scores)] != wanted:
            numbers = " or ".join(map(str, wanted))
            problems.append(
                Problem("--scores", f"the routing reads {numbers} numbers, one per expert; got {len(scores)}.")
            )
        given["expert_scores"] = tuple(scores)
    if problems:
        raise ConfigError(problems, f"cannot evaluate {directory}")
    return given


def _ids_of_rows(
    directory: str, config: MoLoraConfig, tasks: Sequence[str], rows: Sequence[TaskData]
) -> dict[str, int]:
    """The ids that the tasks of rows had in training, by name."""
    names, number = known_tasks(directory), config.num_tasks or 1
    unknown = [*tasks, *(task.name for task in rows if task.name not in names)]
    if unknown:
        message = (
            f"the routing reads the task of each row, and {', '.join(unknown)} was none in training; name the one to "
            f"route by. Known are {_listed(names, number)}."
        )
        raise ConfigError([Problem("--task", message)], f"cannot evaluate {directory}")
    return {task.name: names.index(task.name) for task in rows}


def _listed(names: Sequence[str], number: int) -> str:
    return ", ".join(f"{place} {name}" for place, name in enumerate(names)) or f"numbers from 0 to {number - 1}"
