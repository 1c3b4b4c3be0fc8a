"""What routing must be told besides the tokens, task ids or expert scores, and whether the data of a run says it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from molora.config import MoLoraConfig
from molora.data import TaskData
from molora.errors import ConfigError, Problem
from molora.losses import TASK_IDS, loss_needs
from molora.plan import routing_reads
from molora.runfile import RunFile


def reads_tasks(config: MoLoraConfig) -> bool:
    """Whether routing reads `task_ids`."""
    return "task" in routing_reads(config)


def reads_scores(config: MoLoraConfig) -> bool:
    """Whether routing reads `expert_scores`."""
    return "scores" in routing_reads(config)


def scores_per_row(config: MoLoraConfig) -> list[int]:
    """How many scores the modules of an adapter want; one number, unless `num_experts` is a list."""
    numbers = [config.num_experts] if isinstance(config.num_experts, int) else config.num_experts
    return sorted({number + config.null_experts for number in numbers})


def task_id(task: str | None, names: Sequence[str], number: int) -> int | None:
    """The id of a task given by name or number, or `None`.

    Args:
        task: What was given.
        names: Names of the known tasks, by id.
        number: Tasks that the routing knows.
    """
    if task is None:
        return None
    if task in names:
        return list(names).index(task)
    return int(task) if task.isdecimal() and int(task) < number else None


def check_needs(run: RunFile, tasks: Sequence[TaskData]) -> None:
    """Make sure that the data gives the routing what it reads.

    Raises:
        ConfigError: Listing every need that the data does not meet, with the line that brings it about.
    """
    problems = [Problem(field, message, run.where(field)) for field, message in _unmet(run, tasks)]
    if problems:
        raise ConfigError(problems, f"{run.path} asks for a routing that its data does not allow")


def advice_on_tasks(run: RunFile, tasks: Sequence[TaskData]) -> list[str]:
    """Sentences about routing losses that the data leaves without effect."""
    if len(tasks) > 1:
        return []
    return [
        f"Note: routing loss {name!r} compares tasks, and the data has only one, so it teaches nothing; list more "
        "datasets, or leave it out of `routing_losses`."
        for name in run.adapter.routing_losses
        if TASK_IDS in loss_needs(name, run.adapter.routing_losses[name])
    ]


def _unmet(run: RunFile, tasks: Sequence[TaskData]) -> Iterator[tuple[str, str]]:
    """Yield the field at fault and what is wrong."""
    config = run.adapter
    names = ", ".join(task.name for task in tasks)
    if reads_scores(config):
        yield from _unmet_scores(run, tasks)
    if reads_tasks(config) and (config.num_tasks or 0) < len(tasks):
        yield (
            _line(run, "num_tasks", "router"),
            f"num_tasks is {config.num_tasks}, and the data has {len(tasks)} tasks ({names}); set num_tasks to at "
            f"least {len(tasks)}.",
        )
    setting = config.routing_losses.get("localized_balancing")
    groups = setting.get("groups", 2) if isinstance(setting, dict) else 2
    if setting is not None and len(tasks) > groups:
        yield (
            _line(run, "routing_losses"),
            f"localized_balancing has {groups} groups of experts, one a task, and the data has {len(tasks)} tasks "
            f"({names}); set its `groups` to {len(tasks)}, a divisor of num_experts, or join tasks by the `task` of "
            "their datasets.",
        )


def _unmet_scores(run: RunFile, tasks: Sequence[TaskData]) -> Iterator[tuple[str, str]]:
    config, wanted = run.adapter, scores_per_row(run.adapter)
    cause = "score_weight" if config.score_weight is not None else "weights" if config.weights == "blend" else "router"
    field = _line(run, cause)
    if len(wanted) > 1:
        yield _line(run, "num_experts"), "expert_scores need the same number of experts in every layer."
        return
    example = tasks[0].train[0]
    given = len(example.expert_scores)
    if not given:
        yield (
            field,
            f"the routing reads expert_scores, and the data has none: give each row a list `expert_scores` of "
            f"{wanted[0]} numbers, one per expert (examples/expert_scores.py shows one way).",
        )
    elif given != wanted[0]:
        yield (
            _line(run, "num_experts"),
            f"the routing reads {wanted[0]} expert_scores a row, one per expert, and {example.where} has {given}; "
            f"set num_experts to {given - config.null_experts}, or score again.",
        )


def _line(run: RunFile, *fields: str) -> str:
    """The first of these keys that the file gives; else the preset or adapter that they come from."""
    return next((field for field in (*fields, "preset", "adapter_name_or_path") if run.gives(field)), fields[0])
