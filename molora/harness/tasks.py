"""Find tasks of lm-evaluation-harness by name, and say plainly why one cannot be had."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import constants
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from molora.errors import ConfigError, MoloraError, Problem, did_you_mean


def load_tasks(names: Sequence[str], ours: Sequence[Task], include_path: str | Path | None) -> dict[str, Any]:
    """Load tasks with their data.

    Args:
        names: Tasks, groups or tags; `*` stands for anything.
        ours: Further tasks that are made already.
        include_path: A folder with task files, which win over those of the harness.

    Raises:
        ConfigError: If a name is unknown or given twice.
        MoloraError: If the data of a task cannot be loaded.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise ConfigError([Problem("--include-path", f"there is no folder {str(include_path)!r}.")], "unknown tasks")
    manager, wanted = _find(names, include_path)
    taken = {task.task_name for task in ours}
    if both := sorted(taken & set(wanted)):
        raise ConfigError(
            [Problem("--tasks", f"{both[0]!r} is also the name of a task in the data.")], "unclear tasks"
        )
    return dict(manager.load([*(one for name in wanted for one in _load(manager, name)), *ours]))


def _find(names: Sequence[str], include_path: str | Path | None) -> tuple[TaskManager, list[str]]:
    """Return a manager that knows all names, and the names without wildcards.

    The thousands of tasks that the harness brings take seconds to list, so they are only if they are asked for.
    """
    manager = TaskManager(include_path=include_path and str(include_path), include_defaults=False)
    if not all(manager.match_tasks([name]) for name in names):
        manager = TaskManager(include_path=include_path and str(include_path))
    problems, wanted = [], []
    for name in names:
        found = manager.match_tasks([name])
        if not found:
            hint = did_you_mean(name, manager.all_tasks)
            where = " Give the folder of your own task files with --include-path." if include_path is None else ""
            problems.append(Problem("--tasks", f"lm-evaluation-harness knows no task {name!r}.{hint or where}"))
        wanted += found
    if problems:
        raise ConfigError(problems, "unknown tasks")
    return manager, list(dict.fromkeys(wanted))


def _load(manager: TaskManager, name: str) -> list[Any]:
    """Load a task, a group, or the tasks of a tag."""
    try:
        loaded = manager.load([name])
    # Anything may go wrong in there: hub, file formats, functions of task files.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        if (constants.HF_HUB_OFFLINE or datasets.config.HF_HUB_OFFLINE) and _wants_hub(manager, name):
            raise MoloraError(
                f"task {name!r} reads its data from the hub, and HF_HUB_OFFLINE is set: unset it, or load the data "
                f"once with a connection, or give tasks whose data are local with --include-path or --data ({reason})."
            ) from error
        raise MoloraError(f"the data of task {name!r} cannot be loaded: {reason}.") from error
    groups = loaded["groups"]
    return [groups[name]] if name in groups else list(loaded["tasks"].values())


def _wants_hub(manager: TaskManager, name: str) -> bool:
    """Whether a task names a dataset of the hub; groups and tags are taken to."""
    entry = manager.task_index.get(name)
    source = (entry.cfg or {}).get("dataset_path") if entry is not None else None
    local = {"json", "csv", "parquet", "text", "arrow"}
    return not (isinstance(source, str) and (source in local or Path(source).exists()))
