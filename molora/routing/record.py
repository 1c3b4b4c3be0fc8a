"""Recording: hand the routing decisions of one forward to whoever asked, and nothing to nobody else.

A layer records when a recorder is attached, which only happens inside `record_routing`. The recomputation of gradient
checkpointing runs in the backward pass, after that block has closed, so it is never counted twice; neither is
generation, a reference model's pass, or anything else outside the block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from molora.routing.find import adapted_modules
from molora.routing.masks import TokenMasks, reads_decoder, token_masks
from molora.routing.route import Routing

RECORDER = "routing_recorder"
"""A layer class that has this attribute hands its decisions to the recorder found there, unless it is `None`."""


@dataclass(frozen=True)
class LayerParts:
    """What some losses need of a layer beside its decision; each is `None` unless a loss asked for it.

    Attributes:
        hidden: `A x`, `[..., rows of A]`, attached to the graph.
        columns: From that to what B is multiplied with if every expert counted fully, `[..., C]`.
        down: A, `[R, in]`, attached.
        up: B, `[out, C]`, attached.
        experts: The expert of each column of B, `[C]`, and of each row of A if every expert has its own.
        rows: The router's rows, `[E, d]`, attached.
        token_sums: Sums of the router's features over the tokens that selected each expert, `[E, d]`, detached.
        token_counts: How many tokens these are, `[E]`.
    """

    hidden: Tensor | None = None
    columns: Callable[[Tensor], Tensor] | None = None
    down: Tensor | None = None
    up: Tensor | None = None
    experts: Tensor | None = None
    rows: Tensor | None = None
    token_sums: Tensor | None = None
    token_counts: Tensor | None = None

    @property
    def shapes(self) -> tuple[Any, ...]:
        """Parts can be stacked if these are equal."""
        return tuple(value.shape for value in vars(self).values() if isinstance(value, Tensor))


NO_PARTS = LayerParts()


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
        parts: What else of the layer was asked for, if something was.
        vectors: How many decisions a token has, side by side in place of tokens.
        packed_rows: `[N, M]`: positions of the tokens of each of N examples that are packed into the rows, among all
            tokens of the batch in order; -1 behind an example's end. `None` if every row is one example.
    """

    layer: str
    adapter: str
    routing: Routing
    masks: TokenMasks
    sizes: tuple[int, ...] = ()
    null_experts: int = 0
    parts: LayerParts | None = None
    vectors: int = 1
    packed_rows: Tensor | None = None

    @property
    def per_sequence(self) -> bool:
        """Whether the decision is about whole sequences, so that no token of them is padding."""
        return self.routing.per_sequence

    @property
    def mask(self) -> Tensor | None:
        """Boolean `[B, S]` or `[T]`, true for real tokens; `None` when all are."""
        if self.per_sequence:
            return None
        *rows, tokens = self.routing.logits.shape[:-1]
        mask = self.masks.of_layer(self.layer, torch.Size((*rows, tokens // self.vectors)))
        return mask if mask is None or self.vectors == 1 else mask.repeat_interleave(self.vectors, dim=-1)

    @property
    def packed(self) -> Tensor | None:
        """Positions of the decisions about each packed example, as `packed_rows` has those of its tokens."""
        if self.per_sequence or self.packed_rows is None or self.vectors == 1:
            return None if self.per_sequence else self.packed_rows
        of_tokens = self.packed_rows.unsqueeze(-1)
        beside = torch.arange(self.vectors, device=of_tokens.device)
        return torch.where(of_tokens < 0, -1, of_tokens * self.vectors + beside).flatten(1)

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
        needs: For each adapter the names of the `LayerParts` it is asked for.
        packed_rows: Which tokens are one example, as in `RoutingRecord`.
        outer: Recorder of an enclosing block, which hears of everything too.
    """

    def __init__(
        self,
        with_grad_only: bool = False,
        labels: Tensor | None = None,
        needs: Mapping[str, frozenset[str]] | None = None,
        packed_rows: Tensor | None = None,
        outer: RoutingRecorder | None = None,
    ) -> None:
        self.records: list[RoutingRecord] = []
        self._with_grad_only = with_grad_only
        self._labels = labels
        self._needs = needs or {}
        self._packed_rows = packed_rows
        self._outer = outer
        self._masks = TokenMasks()

    def __deepcopy__(self, memo: dict[int, Any]) -> RoutingRecorder:
        # Nobody reads the records of a copied model, and tensors of a graph cannot be copied.
        return RoutingRecorder()

    def wants(self, part: str, adapter: str) -> bool:
        """Whether this recorder, or one around it, asks for a part of `LayerParts`."""
        asks = part in self._needs.get(adapter, ())
        return asks or (self._outer is not None and self._outer.wants(part, adapter))

    def append(
        self,
        layer: str,
        adapter: str,
        routing: Routing,
        sizes: Sequence[int] = (),
        null_experts: int = 0,
        parts: Callable[[frozenset[str], Tensor | None], LayerParts] | None = None,
        vectors: int = 1,
    ) -> None:
        """Called by a layer for each decision.

        Keeps references and copies only. Recomputation runs without a recorder and must save the same tensors, so
        nothing may happen here that saves one for the backward pass.

        Args:
            layer: Name of the layer.
            adapter: Name of the adapter.
            routing: The decision.
            sizes: Rank of each expert; those of shared experts may follow.
            null_experts: How many columns of the decision, at the end, are null experts.
            parts: Gives what else is asked for: from names of `LayerParts` and the mask of the layer's tokens.
            vectors: How many decisions a token has, side by side in place of tokens.
        """
        if torch.is_grad_enabled() or not self._with_grad_only:
            routed = routing.logits.shape[-1] - null_experts
            ranks = tuple(sizes)[:routed]
            record = RoutingRecord(
                layer, adapter, routing, self._masks, ranks, null_experts, None, vectors, self._packed_rows
            )
            needs = self._needs.get(adapter)
            if needs and parts is not None:
                record = replace(record, parts=parts(needs, record.mask))
            self.records.append(record)
        if self._outer is not None:
            self._outer.append(layer, adapter, routing, sizes, null_experts, parts, vectors)

    def note_masks(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the whole model: remember which tokens of this pass are padding."""
        encoder_decoder = bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False))
        self._masks = token_masks({"labels": self._labels, **kwargs}, encoder_decoder)


@contextmanager
def record_routing(
    model: nn.Module,
    with_grad_only: bool = False,
    labels: Tensor | None = None,
    needs: Mapping[str, frozenset[str]] | None = None,
    packed_rows: Tensor | None = None,
) -> Iterator[list[RoutingRecord]]:
    """Record the routing decisions of every forward of `model` inside the block.

    Args:
        model: Any model that contains molora layers; call it (not a submodule) so that padding is known.
        with_grad_only: Ignore passes under `torch.no_grad()`.
        labels: Labels `[B, S]`, if the model is not called with them; they show the padding of a decoder.
        needs: For each adapter the names of the `LayerParts` that its layers shall add to their records.
        packed_rows: Where examples are packed into rows, the tokens of each; see `RoutingRecord`.

    Yields:
        The list that fills up, one record per linear, active adapter and forward.
    """
    layers = list(adapted_modules(model))
    outer = next((getattr(layer, RECORDER) for _, layer in layers), None)
    recorder = RoutingRecorder(with_grad_only, labels, needs, packed_rows, outer)
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
