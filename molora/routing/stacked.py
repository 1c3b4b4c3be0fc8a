"""Recorded decisions of several linears as one tensor, so that each loss and statistic is one operation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from molora.routing.record import NO_PARTS, LayerParts, RoutingRecord
from molora.routing.route import Routing


@dataclass(frozen=True)
class StackedRouting:
    """The decisions of several linears about the same tokens, stacked so that each statistic is one operation.

    The columns are stacked when first read: a loss that needs no logits should not pay for a copy of them.

    Attributes:
        layers: Names of the linears, L of them.
        routings: The decision of each.
        rows: `[B, S]`. Tokens that are not known to belong to rows count as one; `[B, 1]` for decisions about whole
            sequences.
        mask: Boolean `[B, S]`, true for real tokens; `None` when all are.
        sizes: Rank of each expert, E of them; all 1 if the layers did not say.
        null_experts: How many columns behind the first E are null experts.
        per_sequence: Whether the decisions are about whole sequences.
        parts: What else of each layer was recorded.
        packed_rows: The examples in the rows, `[N, M]`, as in `RoutingRecord`; the rows of all columns and of the
            mask are then the N examples, each M tokens long with padding, and not those of the batch.
    """

    layers: tuple[str, ...]
    routings: tuple[Routing, ...]
    rows: torch.Size
    mask: Tensor | None
    sizes: tuple[int, ...]
    null_experts: int = 0
    per_sequence: bool = False
    parts: tuple[LayerParts, ...] = ()
    packed_rows: Tensor | None = None

    @property
    def num_experts(self) -> int:
        """E, without null experts and shared ones."""
        return len(self.sizes)

    @cached_property
    def logits(self) -> Tensor:
        """`[L, B, S, E + null_experts]`."""
        return self._column("logits")

    @cached_property
    def probabilities(self) -> Tensor:
        """`[L, B, S, E + null_experts]`."""
        return self._column("probabilities")

    @cached_property
    def selected(self) -> Tensor:
        """Boolean `[L, B, S, E + null_experts]`."""
        return self._column("selected")

    @cached_property
    def weights(self) -> Tensor:
        """`[L, B, S, E]`, and behind them those of shared experts."""
        return self._column("weights")

    @cached_property
    def threshold(self) -> Tensor | None:
        """Learned thresholds `[L, B, S, 1]`, or `None`."""
        return None if self.routings[0].threshold is None else self._column("threshold")

    @cached_property
    def clean_logits(self) -> Tensor:
        """Logits before noise, `[L, B, S, E + null_experts]`; the logits themselves where none was added."""
        return self.logits if self.routings[0].clean_logits is None else self._column("clean_logits")

    @cached_property
    def view(self) -> Tensor:
        """Probabilities by a second view, `[L, B, S, E + null_experts]`."""
        return self._column("view")

    @cached_property
    def columns(self) -> Tensor:
        """What B is multiplied with if every expert counts fully, `[L, B, S, C]`."""
        return self._rearranged(
            [part.columns(part.hidden) for part in self.parts if part.columns and part.hidden is not None]
        )

    def part(self, name: str) -> Tensor:
        """A tensor of `LayerParts`, stacked: `[L, ...]`."""
        return torch.stack([getattr(part, name) for part in self.parts])

    def _column(self, name: str) -> Tensor:
        return self._rearranged([getattr(routing, name) for routing in self.routings])

    def _rearranged(self, columns: Sequence[Tensor]) -> Tensor:
        """Stack `[..., n]` of each linear, by row or by packed example."""
        if self.packed_rows is None:
            return torch.stack([column.reshape(*self.rows, column.shape[-1]) for column in columns])
        index = self.packed_rows.clamp(min=0)
        return torch.stack([column.reshape(-1, column.shape[-1])[index] for column in columns])


def stack_records(records: Iterable[RoutingRecord]) -> list[StackedRouting]:
    """Group records of equal shape, masks and device, and stack each group. Linears may differ in their experts."""
    groups: dict[Any, list[RoutingRecord]] = {}
    for record in records:
        routing = record.routing
        given = tuple(value is None for value in (routing.threshold, routing.clean_logits, routing.view))
        shapes = (routing.logits.shape, routing.weights.shape, given, (record.parts or NO_PARTS).shapes)
        kind = (record.reads_decoder, record.per_sequence, record.sizes, record.null_experts, routing.logits.device)
        groups.setdefault((shapes, id(record.masks), kind), []).append(record)
    return [_stack(group) for group in groups.values()]


def _stack(records: list[RoutingRecord]) -> StackedRouting:
    first = records[0]
    rows, mask, packed = first.rows, first.mask, first.packed
    if packed is not None:
        rows, real = packed.shape, packed >= 0
        mask = real if mask is None else real & mask.reshape(-1)[packed.clamp(min=0)]
    return StackedRouting(
        tuple(record.layer for record in records),
        tuple(record.routing for record in records),
        rows,
        None if mask is None else mask.reshape(rows),
        first.sizes or (1,) * (first.routing.logits.shape[-1] - first.null_experts),
        first.null_experts,
        first.per_sequence,
        tuple(record.parts or NO_PARTS for record in records),
        packed,
    )
