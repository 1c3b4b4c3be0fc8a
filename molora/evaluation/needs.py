"""What routing reads must be there before anything is scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peft import PeftModel

from molora.config import MoLoraConfig
from molora.data.mixture import TaskData
from molora.errors import ConfigError, Problem
from molora.plan import routing_reads


def check_routing(
    model: Any,
    names: Sequence[str],
    data: Sequence[TaskData],
    common: int | None,
    by_name: Mapping[str, int],
    expert_scores: Sequence[float],
) -> None:
    """Refuse an evaluation whose rows lack what the routing reads.

    Args:
        model: The model, with the adapter that will route.
        names: Names of tasks whose rows bring nothing.
        data: Tasks with rows of their own.
        common: The id of the task of all rows, if one is given.
        by_name: Ids of tasks by name.
        expert_scores: Scores of rows that bring none.

    Raises:
        ConfigError: Naming the tasks, and how to give it.
    """
    adapters = model.active_adapters if isinstance(model, PeftModel) else []
    configs = [config for name in adapters if isinstance(config := model.peft_config[name], MoLoraConfig)]
    reads = frozenset().union(*map(routing_reads, configs))
    problems = []
    if "task" in reads:
        number = min(config.num_tasks or 1 for config in configs if "task" in routing_reads(config))
        without = [*names, *(task.name for task in data if task.name not in by_name)] if common is None else []
        if without:
            message = f"the routing reads the task of each row, and nothing says it for {', '.join(without)}; give it."
            problems.append(Problem("task", message))
        wrong = [index for index in (common, *by_name.values()) if index is not None and not 0 <= index < number]
        if wrong:
            problems.append(Problem("task", f"there is no task {wrong[0]}; the adapter knows 0 to {number - 1}."))
    if "scores" in reads and not expert_scores:
        bare = [task.name for task in data if not all(example.expert_scores for example in task.eval)]
        if without := [*names, *bare]:
            message = (
                f"the routing reads scores of the experts, and rows of {', '.join(without)} have none; give them."
            )
            problems.append(Problem("scores", message))
    if problems:
        raise ConfigError(problems, "the adapter cannot be evaluated so")
