"""Selections of every expert since the last optimizer step: this process's own, and those of all processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import reduce
from torch import Tensor

from molora.routing.stacked import StackedRouting
from molora.routing.statistics import selection_counts

Key = tuple[str, str]
"""Adapter and name of the linear."""


@dataclass(frozen=True)
class LinearCounts:
    """What one linear's routing selected.

    Attributes:
        selected: Times each expert was selected since the last optimizer step, `[E + null_experts]`.
        tokens: Tokens that selected, a scalar.
        tokens_now: Of these, the tokens of the current micro-batch, a mean over processes; a scalar.
    """

    selected: Tensor
    tokens: Tensor
    tokens_now: Tensor


class StepCounts:
    """Counts of one optimizer step, over its micro-batches."""

    def __init__(self) -> None:
        self._selected: dict[Key, Tensor] = {}
        self._tokens: dict[Key, Tensor] = {}
        self._tokens_now: dict[Key, Tensor] = {}

    def start_micro_batch(self) -> None:
        """The next decisions are those of another micro-batch."""
        self._tokens_now.clear()

    def add(self, adapter: str, stacks: Iterable[StackedRouting]) -> None:
        """Add the selections of real tokens, whole or in part, of the current micro-batch."""
        for stack in stacks:
            rows = stack.probabilities.shape[1:3]
            tokens = torch.full((), float(rows.numel()), device=stack.probabilities.device)
            if stack.mask is not None:
                tokens = stack.mask.float().sum()
            for layer, selected in zip(stack.layers, selection_counts(stack), strict=True):
                key = (adapter, layer)
                for held, value in (
                    (self._selected, selected),
                    (self._tokens, tokens),
                    (self._tokens_now, tokens),
                ):
                    held[key] = held[key] + value if key in held else value

    def clear(self) -> None:
        """Count anew."""
        self._selected.clear()
        self._tokens.clear()
        self._tokens_now.clear()

    def everyones(self, model: Any, adapters: Iterable[str]) -> dict[Key, LinearCounts]:
        """The counts of all processes, in one reduction. All of them must call this equally often.

        The linears come from the model and not from what was counted, for processes may have run different ones.

        Args:
            model: The adapted model.
            adapters: Names of the adapters whose linears are wanted.
        """
        widths = dict(_routed_linears(model, adapters))
        if not widths:
            return {}
        device = next((counts.device for counts in self._selected.values()), None)
        if device is None:
            device = next(model.parameters()).device
        parts = []
        for key, width in widths.items():
            zero = torch.zeros((), device=device)
            selected = self._selected.get(key, zero.expand(width)).to(device, torch.float32)
            tokens = [held.get(key, zero).to(device).reshape(1) for held in (self._tokens, self._tokens_now)]
            parts.append(torch.cat([selected, *tokens]))
        everyones = reduce(torch.cat(parts), reduction="sum").split([len(part) for part in parts])
        processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        return {
            key: LinearCounts(counts[:-2], counts[-2], counts[-1] / processes)
            for key, counts in zip(widths, everyones, strict=True)
        }


def _routed_linears(model: Any, adapters: Iterable[str]) -> Iterator[tuple[Key, int]]:
    """The linears whose decisions are recorded, in the order of the model, and the number of their experts."""
    for adapter in adapters:
        for name, module in model.named_modules():
            plan = getattr(module, "molora_plan", {}).get(adapter)
            if plan is not None and plan.reads:
                yield (adapter, name), plan.num_experts + plan.spec.null_experts
