"""Which experts the rows of each task use."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft import PeftModel

from benchmarks.quality.data import Item
from benchmarks.quality.training import Place, answer_losses
from molora.routing.affinity import load, sums_of
from molora.routing.inputs import routing_inputs, scopes
from molora.routing.masks import prompt_of_labels
from molora.routing.record import record_routing
from molora.routing.stacked import stack_records

ROWS = 8
"""Rows a batch."""


def expert_shares(model: PeftModel, tasks: Sequence[Sequence[Item]], place: Place) -> list[list[float]] | None:
    """Share of each task's gate weight that each expert has, mean over linears: N tasks of E; None without experts.

    Args:
        model: An adapted model in evaluation mode.
        tasks: Rows by task, at least one each.
        place: Where to run.
    """
    if not scopes(model):
        return None
    found = [_of_task(model, rows, place) for rows in tasks]
    return [[round(share, 5) for share in own] for own in found if own] or None


@torch.no_grad()
def _of_task(model: PeftModel, rows: Sequence[Item], place: Place) -> list[float]:
    """Shares of each expert, or nothing if none is chosen anywhere."""
    weights: dict[tuple[str, ...], torch.Tensor] = {}
    ordered = sorted(rows, key=lambda item: item.length)
    for at in range(0, len(ordered), ROWS):
        batch = place.batch(ordered[at : at + ROWS], 0)
        labels = batch["labels"]
        given = routing_inputs(model, prompt_mask=prompt_of_labels(labels, batch["attention_mask"]))
        with place.precision(), record_routing(model, labels=labels) as records, given:
            answer_losses(model, batch)
        for stack in stack_records(records):
            if stack.num_experts > 1:
                own = sums_of(stack, labels >= 0, 0, 1).cpu().weights
                weights[stack.layers] = weights.get(stack.layers, 0) + own
    if not weights:
        return []
    means: list[float] = load(torch.cat(list(weights.values()))).mean(dim=0).tolist()
    return means
