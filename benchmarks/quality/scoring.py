"""Score rows as `molora train` does, and look at the routing of rows; each in batches of similar length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from benchmarks.quality.data import Batch, Item
from benchmarks.quality.routing import summary
from benchmarks.quality.training import Place, answer_losses
from molora.evaluation.rows import EncodedRow, score_rows
from molora.routing.affinity import Sums, sums_of
from molora.routing.inputs import routing_inputs, scopes
from molora.routing.masks import prompt_of_labels
from molora.routing.record import record_routing
from molora.routing.stacked import stack_records

BATCH = {"cpu": 16, "cuda": 128}
"""Rows of a batch that is scored."""

TOKENS = {"cpu": 1024, "cuda": 4096}
"""Tokens of a batch whose routing is looked at, padding included."""


def score(
    model: PeftModel, tasks: Sequence[Sequence[Item]], place: Place, *, experts: int = 0, choices: bool = True
) -> list[dict[str, list[Any]]]:
    """Score the rows of each task.

    Args:
        model: An adapted model in evaluation mode.
        tasks: Rows by task; a task may have none.
        place: Where to run.
        experts: Experts of an arm whose rows name their own expert by the task; else 0.
        choices: Also choose among the choices of rows that have some.

    Returns:
        For each task lists over its rows: `nll`, the summed loss of the answer; `tokens` of the answer; `exact`, 1 if
        every one of them is what the model would have written after those before; `choice`, 1 if the right choice is
        likeliest, None where nothing is chosen.
    """
    with torch.no_grad(), place.precision():
        return [_of_task(model, rows, place, experts, choices) for rows in tasks]


def _of_task(
    model: PeftModel, rows: Sequence[Item], place: Place, experts: int, choices: bool
) -> dict[str, list[Any]]:
    encoded = [_encoded(item, experts, choices) for item in rows]
    found = score_rows(model, place.pad, encoded, BATCH[place.device], task_id=rows[0].task if rows else None)
    picks = [one.chosen_by_length if item.by_length else one.chosen for item, one in zip(rows, found, strict=True)]
    return {
        "nll": [round(one.nll, 6) for one in found],
        "tokens": [one.tokens for one in found],
        "exact": [int(one.greedy) for one in found],
        "choice": [None if pick is None else int(pick) for pick in picks],
    }


def _encoded(item: Item, experts: int, choices: bool) -> EncodedRow:
    scores = item.scores(experts)
    if choices and item.choices:
        return EncodedRow(item.prompt, item.choices, item.label, item.characters, scores)
    return EncodedRow(item.prompt, [item.answer], expert_scores=scores)


def routing_of(
    model: PeftModel, tasks: Sequence[Sequence[Item]], place: Place, *, experts: int = 0
) -> dict[str, dict[str, float]] | None:
    """Figures of the routing of rows, by linear and as `mean`; None if nothing is routed.

    Args:
        model: An adapted model in evaluation mode.
        tasks: Rows by task.
        place: Where to run.
        experts: As in `score`.
    """
    found: dict[tuple[str, ...], Sums] = {}
    with torch.no_grad(), place.precision():
        for task, rows in enumerate(tasks):
            for batch in _batches(rows, TOKENS[place.device]):
                given = place.batch([rows[at] for at in batch], experts)
                labels = given["labels"]
                with record_routing(model, labels=labels) as records, _routed(model, given):
                    answer_losses(model, given)
                for stack in stack_records(records):
                    if stack.num_experts > 1:
                        sums = sums_of(stack, labels >= 0, task, len(tasks))
                        found[stack.layers] = found[stack.layers] + sums if stack.layers in found else sums
    return summary(found) or None


def _routed(model: PeftModel, batch: dict[str, Tensor]) -> AbstractContextManager[None]:
    """A block in which the layers find the routing columns of a batch."""
    if not scopes(model):
        return nullcontext()
    return routing_inputs(
        model,
        task_ids=batch["task_ids"],
        expert_scores=batch.get("expert_scores"),
        prompt_mask=prompt_of_labels(batch["labels"], batch["attention_mask"]),
    )


def _batches(items: Sequence[Item] | Batch, tokens: int) -> Iterator[list[int]]:
    """Indices of items of similar length, with at most so many tokens a batch, or one item."""
    batch: list[int] = []
    for at in sorted(range(len(items)), key=lambda at: items[at].length, reverse=True):
        if batch and items[batch[0]].length * (len(batch) + 1) > tokens:
            yield batch
            batch = []
        batch.append(at)
    if batch:
        yield batch


def task_losses(scored: Sequence[dict[str, list[Any]]]) -> list[float | None]:
    """Mean loss of an answer token, for each task; None for one without rows."""
    return [sum(task["nll"]) / sum(task["tokens"]) if task["tokens"] else None for task in scored]


def mean_loss(scored: Sequence[dict[str, list[Any]]]) -> float:
    """Mean of the tasks' losses, over those that have rows."""
    known = [loss for loss in task_losses(scored) if loss is not None]
    return sum(known) / len(known)
