"""Recording: hand the routing decisions of one forward to whoever asked, and nothing to nobody else.

A layer records when a recorder is attached, which only happens inside `record_routing`. The recomputation of gradient
checkpointing runs in the backward pass, after that block has closed, so it is never counted twice; neither is
generation, a reference model's pass, or anything else outside the block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from molora.routing.masks import TokenMasks, reads_decoder, token_masks
from molora.routing.route import Routing

RECORDER = "routing_recorder"
"""A layer class that has this attribute hands its decisions to the recorder found there, unless it is `None`."""


@dataclass(frozen=True)
class RoutingRecord:
    """One routing decision with what is needed to judge it.

    Attributes:
        layer: Name of the linear inside the model.
        adapter: Name of the adapter.
        routing: The decision, tensors `[B, S, E]` or `[T, E]`, still attached to the graph; `[B, 1, E]` for a
            decision about whole sequences.
        masks: Which tokens of the forward pass are real.
        sizes: Rank of each expert that is routed to; empty if the layer did not say.
        null_experts: How many of the decision's columns, at the end, are null experts.
    """

    layer: str
    adapter: str
    routing: Routing
    masks: TokenMasks
    sizes: tuple[int, ...] = ()
    null_experts: int = 0

    @property
    def per_sequence(self) -> bool:
        """Whether the decision is about whole sequences, so that no token of them is padding."""
        return self.routing.per_sequence

    @property
    def mask(self) -> Tensor | None:
        """Boolean `[B, S]` or `[T]`, true for real tokens; `None` when all are."""
        if self.per_sequence:
            return None
        return self.masks.of_layer(self.layer, self.routing.logits.shape[:-1])

    @property
    def rows(self) -> torch.Size:
        """`[B, S]` of the decision's tokens. Those a module flattened get their rows back if the mask knows them."""
        shape = self.routing.logits.shape[:-1]
        if len(shape) > 1:
            return torch.Size((shape[0], shape[1:].numel()))
        whole = self.masks.of_decoder if self.reads_decoder else self.masks.of_input
        known = isinstance(whole, Tensor) and whole.ndim == 2 and whole.numel() == shape.numel()
        return whole.shape if known and whole is not None else torch.Size((1, *shape))

    @property
    def reads_decoder(self) -> bool:
        """Whether the tokens are those of an encoder-decoder's decoder."""
        return self.masks.encoder_decoder and reads_decoder(self.layer)


class RoutingRecorder:
    """Collects the records of the forward passes that run while it is attached.

    Args:
        with_grad_only: Ignore passes under `torch.no_grad()`, such as a reference model's.
        labels: Labels of the batch, where the model is not handed them (a trainer may compute the loss itself).
        outer: Recorder of an enclosing block, which hears of everything too.
    """

    def __init__(
        self, with_grad_only: bool = False, labels: Tensor | None = None, outer: RoutingRecorder | None = None
    ) -> None:
        self.records: list[RoutingRecord] = []
        self._with_grad_only = with_grad_only
        self._labels = labels
        self._outer = outer
        self._masks = TokenMasks()

    def __deepcopy__(self, memo: dict[int, Any]) -> RoutingRecorder:
        # Nobody reads the records of a copied model, and tensors of a graph cannot be copied.
        return RoutingRecorder()

    def append(
        self, layer: str, adapter: str, routing: Routing, sizes: Sequence[int] = (), null_experts: int = 0
    ) -> None:
        """Called by a layer for each decision. Keeps references only: recomputation must run the same operations.

        Args:
            layer: Name of the layer.
            adapter: Name of the adapter.
            routing: The decision.
            sizes: Rank of each expert; those of shared experts may follow.
            null_experts: How many columns of the decision, at the end, are null experts.
        """
        if torch.is_grad_enabled() or not self._with_grad_only:
            routed = routing.logits.shape[-1] - null_experts
            ranks = tuple(sizes)[:routed]
            self.records.append(RoutingRecord(layer, adapter, routing, self._masks, ranks, null_experts))
        if self._outer is not None:
            self._outer.append(layer, adapter, routing, sizes, null_experts)

    def note_masks(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the whole model: remember which tokens of this pass are padding."""
        encoder_decoder = bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False))
        self._masks = token_masks({"labels": self._labels, **kwargs}, encoder_decoder)


@contextmanager
def record_routing(
    model: nn.Module, with_grad_only: bool = False, labels: Tensor | None = None
) -> Iterator[list[RoutingRecord]]:
    """Record the routing decisions of every forward of `model` inside the block.

    Args:
        model: Any model that contains molora layers; call it (not a submodule) so that padding is known.
        with_grad_only: Ignore passes under `torch.no_grad()`.
        labels: Labels `[B, S]`, if the model is not called with them; they show the padding of a decoder.

    Yields:
        The list that fills up, one record per linear, active adapter and forward.
    """
    layers = [(name, module) for name, module in model.named_modules() if hasattr(type(module), RECORDER)]
    outer = next((getattr(layer, RECORDER) for _, layer in layers), None)
    recorder = RoutingRecorder(with_grad_only, labels, outer)
    hook = model.register_forward_pre_hook(recorder.note_masks, with_kwargs=True)
    for name, layer in layers:
        layer.routing_name = name
        setattr(layer, RECORDER, recorder)
    try:
        yield recorder.records
    finally:
        hook.remove()
        for _, layer in layers:
            setattr(layer, RECORDER, outer)


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
    """

    layers: tuple[str, ...]
    routings: tuple[Routing, ...]
    rows: torch.Size
    mask: Tensor | None
    sizes: tuple[int, ...]
    null_experts: int = 0
    per_sequence: bool = False

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

    def _column(self, name: str) -> Tensor:
        columns = [getattr(routing, name) for routing in self.routings]
        return torch.stack([column.reshape(*self.rows, column.shape[-1]) for column in columns])


def stack_records(records: Iterable[RoutingRecord]) -> list[StackedRouting]:
    """Group records of equal shape and masks, and stack each group. Linears may differ in their number of experts."""
    groups: dict[Any, list[RoutingRecord]] = {}
    for record in records:
        routing = record.routing
        shapes = (routing.logits.shape, routing.weights.shape, routing.threshold is None)
        kind = (record.reads_decoder, record.per_sequence, record.sizes, record.null_experts)
        groups.setdefault((shapes, id(record.masks), kind), []).append(record)
    return [_stack(group) for group in groups.values()]


def _stack(records: list[RoutingRecord]) -> StackedRouting:
    first = records[0]
    mask = first.mask
    return StackedRouting(
        tuple(record.layer for record in records),
        tuple(record.routing for record in records),
        first.rows,
        None if mask is None else mask.reshape(first.rows),
        first.sizes or (1,) * (first.routing.logits.shape[-1] - first.null_experts),
        first.null_experts,
        first.per_sequence,
    )
