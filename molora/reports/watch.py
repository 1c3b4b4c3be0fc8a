"""What rows show of an adapter's routing: sums task by task, experts per token, thresholds, and one text's tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from molora.data import TokenizedTask
from molora.heads import last_logits_only
from molora.modes import evaluating
from molora.plain.moments import Batch, run_batch
from molora.progress import bar
from molora.routing.affinity import Sums, sums_of
from molora.routing.record import RoutingRecord, record_routing
from molora.routing.stacked import StackedRouting, stack_records
from molora.slim.adapter import PREFIX

BINS = 32
"""Of the histogram of thresholds."""


@dataclass
class Seen:
    """Sums over the rows of all tasks. Keys are names of linears in the base model.

    Attributes:
        sums: By linear, its own sums `[1, N, ...]`.
        counts: By linear, decisions that use 0, 1, … experts, `[E + 1]`.
        thresholds: By linear, learned thresholds in bins up to the highest, `[BINS]`.
        threshold_sums: By linear, their sum and number, `[2]`.
    """

    sums: dict[str, Sums] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)
    thresholds: dict[str, Tensor] = field(default_factory=dict)
    threshold_sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, stack: StackedRouting, answers: Tensor, task: int, tasks: int, highest: float) -> None:
        """Add the decisions about a batch of one task."""
        found = sums_of(stack, answers, task, tasks).cpu()
        used = stack.selected[..., : stack.num_experts].sum(dim=-1)
        mask = torch.ones(stack.rows, dtype=torch.bool) if stack.mask is None else stack.mask.bool().cpu()
        for index, layer in enumerate(stack.layers):
            name = layer.removeprefix(PREFIX)
            own = Sums(*(value[index : index + 1] for value in vars(found).values()))
            self.sums[name] = self.sums[name] + own if name in self.sums else own
            counts = torch.bincount(used[index].cpu()[mask], minlength=stack.num_experts + 1).double()
            _add(self.counts, name, counts)
            if stack.threshold is not None:
                levels = stack.threshold[index, ..., 0].float().cpu()[mask]
                _add(self.thresholds, name, torch.histc(levels.clamp(0, highest), BINS, 0, highest).double())
                _add(self.threshold_sums, name, torch.tensor([float(levels.sum()), levels.numel()]).double())


def _add(held: dict[str, Tensor], name: str, value: Tensor) -> None:
    held[name] = held[name] + value if name in held else value


@torch.no_grad()
def watch_rows(
    model: nn.Module,
    tasks: Sequence[TokenizedTask],
    collate: Callable[[list[Any]], Batch],
    rows: int,
    highest: float,
    batch_size: int = 8,
) -> Seen:
    """Run rows of each task through a model.

    Args:
        model: The adapted model; left in the mode it was in.
        tasks: Tokenised rows.
        collate: Makes a batch of them.
        rows: Rows of each task.
        highest: What learned thresholds can reach.
        batch_size: Rows of a pass.
    """
    seen = Seen()
    options = _options(model)
    chosen = [list(task.dataset.select(range(min(rows, len(task.dataset))))) for task in tasks]
    with evaluating(model), bar(sum(map(len, chosen)), "routing", "row") as shown:
        for index, own in enumerate(chosen):
            for start in range(0, len(own), batch_size):
                batch = collate(own[start : start + batch_size])
                with record_routing(model) as records:
                    run_batch(model, batch, **options)
                answers = batch["labels"] >= 0
                for stack in stack_records(records):
                    seen.add(stack, answers.to(stack.probabilities.device), index, len(tasks), highest)
                shown.update(len(batch["input_ids"]))
    return seen


@torch.no_grad()
def watch_text(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Shares of mixing weight of every token of one row, by linear, `[T, E]`.

    Args:
        model: The adapted model.
        batch: One row without padding.
    """
    tokens = batch["input_ids"].shape[1]
    with evaluating(model), record_routing(model) as records:
        run_batch(model, batch, **_options(model))
    found = {record.layer.removeprefix(PREFIX): _by_token(record, tokens) for record in records}
    return {name: weights for name, weights in found.items() if weights is not None}


def _options(model: nn.Module) -> dict[str, Any]:
    options: dict[str, Any] = {"use_cache": False} if hasattr(model, "generate") else {}
    return options | last_logits_only(model)


def _by_token(record: RoutingRecord, tokens: int) -> Tensor | None:
    """A decision's weights as shares, `[T, E]`; `None` if they are about other tokens, as in a mixture of the base."""
    experts = record.routing.logits.shape[-1] - record.null_experts
    weights = record.routing.weights[..., :experts].detach().abs().float().cpu().reshape(-1, experts)
    if record.per_sequence:
        weights = weights.mean(dim=0).expand(tokens, experts)
    elif len(weights) != tokens * record.vectors:
        return None
    else:
        weights = weights.reshape(tokens, record.vectors, experts).mean(dim=1)
    total = weights.sum(dim=-1, keepdim=True)
    return weights / torch.where(total > 0, total, 1)
