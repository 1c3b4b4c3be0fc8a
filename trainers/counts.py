"""Selections of every expert since the last optimizer step: this process's own, and those of all processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import reduce
from torch import Tensor

from molora.routing.find import adapted_modules
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
        tokens_now: Tokens of one forward pass of the current micro-batch that gave any probability, a mean over
            processes and passes; a scalar.
        null_experts: How many of the experts, at the end, are null experts.
    """

    selected: Tensor
    tokens: Tensor
    tokens_now: Tensor
    null_experts: int = 0


class StepCounts:
    """Counts of one optimizer step, over its micro-batches."""

    def __init__(self) -> None:
        self._selected: dict[Key, Tensor] = {}
        self._tokens: dict[Key, Tensor] = {}
        self._tokens_now: dict[Key, Tensor] = {}
        self._passes_now: dict[Key, int] = {}

    def start_micro_batch(self) -> None:
        """The next decisions are those of another micro-batch."""
        self._tokens_now.clear()
        self._passes_now.clear()

    def add(self, adapter: str, stacks: Iterable[StackedRouting]) -> None:
        """Add the selections of real tokens, whole or in part, of the current micro-batch."""
        for stack in stacks:
            real = stack.probabilities.new_ones(stack.probabilities.shape[1:3]) if stack.mask is None else stack.mask
            routed = ((stack.probabilities > 0).any(dim=-1) & real.bool()).sum(dim=(1, 2)).float()  # [L]
            tokens = real.float().sum()
            for layer, selected, given in zip(stack.layers, selection_counts(stack), routed, strict=True):
                key = (adapter, layer)
                _add(self._selected, key, selected)
                _add(self._tokens, key, tokens)
                _add(self._tokens_now, key, given)
                self._passes_now[key] = self._passes_now.get(key, 0) + 1

    def clear(self) -> None:
        """Count anew."""
        self._selected.clear()
        self._tokens.clear()
        self.start_micro_batch()

    def everyones(self, model: Any, adapters: Iterable[str]) -> dict[Key, LinearCounts]:
        """The counts of all processes, in one reduction. All of them must call this equally often.

        The linears come from the model and not from what was counted, for processes may have run different ones.

        Args:
            model: The adapted model.
            adapters: Names of the adapters whose linears are wanted.
        """
        linears = dict(_routed_linears(model, adapters))
        if not linears:
            return {}
        device = next((counts.device for counts in self._selected.values()), None)
        if device is None:
            device = next(model.parameters()).device
        parts = []
        for key, (width, _) in linears.items():
            zero = torch.zeros((), device=device)
            now = self._tokens_now.get(key, zero) / max(1, self._passes_now.get(key, 0))
            totals = [self._selected.get(key, zero.expand(width)), self._tokens.get(key, zero), now]
            parts.append(torch.cat([total.to(device, torch.float32).reshape(-1) for total in totals]))
        everyones = reduce(torch.cat(parts), reduction="sum").split([len(part) for part in parts])
        processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        return {
            key: LinearCounts(counts[:-2], counts[-2], counts[-1] / processes, null_experts)
            for (key, (_, null_experts)), counts in zip(linears.items(), everyones, strict=True)
        }


def _add(held: dict[Key, Tensor], key: Key, value: Tensor) -> None:
    held[key] = held[key] + value if key in held else value


def _routed_linears(model: Any, adapters: Iterable[str]) -> Iterator[tuple[Key, tuple[int, int]]]:
    """The linears whose decisions are recorded, in the order of the model: all experts, and the null ones of them."""
    for adapter in adapters:
        for name, module in adapted_modules(model):
            plan = module.molora_plan.get(adapter)
            if plan is not None and plan.reads:
                yield (adapter, name), (plan.num_experts + plan.spec.null_experts, plan.spec.null_experts)
