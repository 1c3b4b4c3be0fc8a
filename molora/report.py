"""What a trained mixture does with each task: the routing of held-out rows, task by task."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.table import Table

from molora.data import TokenizedTask
from molora.progress import tracked
from molora.routing.inputs import routing_inputs, scopes
from molora.routing.masks import prompt_of_labels
from molora.routing.record import record_routing
from molora.routing.stacked import stack_records
from molora.routing.statistics import RoutingTally, tally

REPORT_FILE = "molora_report.json"
"""Written beside the adapter: the tasks by id, their scores before and after training, and their routing."""


@dataclass(frozen=True)
class TaskRouting:
    """Routing of one task's held-out rows; every number is an average over linears.

    Attributes:
        task: Name of the task.
        tokens: Tokens counted.
        metrics: As in the training log: `experts_per_token`, `load_max`, `entropy`, `threshold_mean`, …
        distance: How far the task's expert load is from that of all tasks together, as total variation: 0 means it
            uses the experts as the others do, 1 that it shares none with them.
    """

    task: str
    tokens: int
    metrics: dict[str, float]
    distance: float


def routing_by_task(
    model: PeftModel,
    tasks: Sequence[TokenizedTask],
    collate: Callable[[list[Any]], dict[str, torch.Tensor]],
    rows: int = 32,
    batch_size: int = 16,
) -> list[TaskRouting]:
    """Run rows of each task through the model and sum up where the tokens went.

    Args:
        model: The adapted model; left in the mode it was in.
        tasks: Tokenised held-out rows.
        collate: Makes a batch of rows; `task_ids`, `expert_scores` and the prompt by its labels reach the routing.
        rows: Rows of each task to look at.
        batch_size: Rows in a forward pass.

    Returns:
        One entry a task; none if nothing is routed.
    """
    was_training = model.training
    model.eval()
    tallies: dict[str, RoutingTally] = {}
    for task in tracked(tasks, "looking at the routing", "task"):
        chosen = task.dataset.select(range(min(rows, len(task.dataset))))
        counted = [_tally_batch(model, collate(list(part))) for part in _batches(list(chosen), batch_size)]
        known = [one for one in counted if one is not None]
        if known:
            tallies[task.name] = sum(known[1:], start=known[0])
    model.train(was_training)
    if not tallies:
        return []
    everything = sum(list(tallies.values())[1:], start=next(iter(tallies.values()))).load()
    return [
        TaskRouting(
            name,
            int(counted.tokens.max().item()),
            counted.metrics(),
            ((counted.load() - everything).abs().sum(dim=-1) / 2).mean().item(),
        )
        for name, counted in tallies.items()
    ]


@torch.no_grad()
def _tally_batch(model: PeftModel, batch: dict[str, torch.Tensor]) -> RoutingTally | None:
    device = next(model.parameters()).device
    inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
    columns = ("task_ids", "expert_scores")
    given: dict[str, Any] = {name: batch[name].to(device) for name in columns if name in batch}
    if "labels" in batch:
        given["prompt_mask"] = prompt_of_labels(batch["labels"].to(device), inputs["attention_mask"])
    block = routing_inputs(model, **given) if scopes(model) else nullcontext()
    with record_routing(model) as records, block:
        model(**inputs, use_cache=False, logits_to_keep=1)
    return tally(stack_records(records))


def _batches(rows: list[Any], size: int) -> list[list[Any]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def routing_table(tasks: Sequence[TaskRouting]) -> Table:
    """Lay the routing of every task out for a terminal; `experts` is how many a token uses."""
    columns = {
        "experts": "experts_per_token",
        "max load": "load_max",
        "dead": "dead_experts",
        "threshold": "threshold_mean",
    }
    if not any(task.metrics[columns["threshold"]] for task in tasks):
        del columns["threshold"]
    table = Table()
    table.add_column("task", no_wrap=True)
    for column in ("tokens", *columns, "distance"):
        table.add_column(column, justify="right")
    for task in tasks:
        numbers = [f"{task.metrics[metric]:.3f}" for metric in columns.values()]
        table.add_row(task.task, str(task.tokens), *numbers, f"{task.distance:.3f}")
    return table


def known_tasks(directory: str) -> list[str]:
    """Names of the tasks an adapter was trained on, by id, if its run left a report; else none."""
    try:
        report = json.loads((Path(directory) / REPORT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [str(name) for name in report.get("tasks", [])]
