"""Recording: hand the routing decisions of one forward to whoever asked, and nothing to nobody else.

A layer records when a recorder is attached, which only happens inside `record_routing`. The recomputation of gradient
checkpointing runs in the backward pass, after that block has closed, so it is never counted twice; neither is
generation, a reference model's pass, or anything else outside the block.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from molora.routing.route import Routing

RECORDER = "routing_recorder"
"""A layer class that has this attribute hands its decisions to the recorder found there, unless it is `None`."""


@dataclass(frozen=True)
class TokenMasks:
    """Masks of one forward pass, true for real tokens.

    Attributes:
        of_input: `[B, S]` of the model's input, the encoder's if it has one; `None` if all tokens are real.
        of_decoder: `[B, S]` of an encoder-decoder's decoder; `None` as above.
        encoder_decoder: Whether the model has both sides.
    """

    of_input: Tensor | None = None
    of_decoder: Tensor | None = None
    encoder_decoder: bool = False

    def of_layer(self, layer: str, shape: torch.Size) -> Tensor | None:
        """Find the mask of one layer's tokens.

        Args:
            layer: Name of the linear; tells an encoder-decoder's two sides apart.
            shape: `[B, S]` or `[T]` of the layer's tokens.

        Returns:
            Boolean mask of that shape, or `None` if every token counts. With a key-value cache the mask is longer than
            the input, and its end is what belongs to it.
        """
        mask = self.of_decoder if self.encoder_decoder and _reads_decoder(layer) else self.of_input
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            return None
        if len(shape) == 2 and mask.shape[0] == shape[0] and mask.shape[1] >= shape[1]:
            return mask[:, mask.shape[1] - shape[1] :].bool()
        return mask.reshape(shape).bool() if mask.numel() == shape.numel() else None


def token_masks(kwargs: dict[str, Any], encoder_decoder: bool) -> TokenMasks:
    """Read the masks from a model's keyword arguments; a decoder without one takes the labelled positions."""
    of_decoder, labels = kwargs.get("decoder_attention_mask"), kwargs.get("labels")
    if encoder_decoder and of_decoder is None and labels is not None:
        of_decoder = labels != -100
    return TokenMasks(kwargs.get("attention_mask"), of_decoder, encoder_decoder)


def _reads_decoder(layer: str) -> bool:
    # Keys and values of cross-attention stand in the decoder and read the encoder's tokens.
    cross_key_value = re.search(r"(EncDecAttention|encoder_attn|crossattention)\.(.*\.)?(k|v|key|value)", layer)
    return re.search(r"(^|\.)decoder\.", layer) is not None and not cross_key_value


@dataclass(frozen=True)
class RoutingRecord:
    """One routing decision with what is needed to judge it.

    Attributes:
        layer: Name of the linear inside the model.
        adapter: Name of the adapter.
        routing: The decision, tensors `[B, S, E]` or `[T, E]`, still attached to the graph.
        masks: Which tokens of the forward pass are real.
    """

    layer: str
    adapter: str
    routing: Routing
    masks: TokenMasks

    @property
    def mask(self) -> Tensor | None:
        """Boolean `[B, S]` or `[T]`, true for real tokens; `None` when all are."""
        return self.masks.of_layer(self.layer, self.routing.logits.shape[:-1])


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

    def append(self, layer: str, adapter: str, routing: Routing) -> None:
        """Called by a layer for each decision. Keeps references only: recomputation must run the same operations."""
        if torch.is_grad_enabled() or not self._with_grad_only:
            self.records.append(RoutingRecord(layer, adapter, routing, self._masks))
        if self._outer is not None:
            self._outer.append(layer, adapter, routing)

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

    Attributes:
        layers: Names of the linears, L of them.
        probabilities: `[L, B, S, E]`; tokens without batch dimension count as one sequence.
        selected: Boolean `[L, B, S, E]`.
        threshold: Learned thresholds `[L, B, S, 1]`, or `None`.
        mask: Boolean `[B, S]`, true for real tokens; `None` when all are.
    """

    layers: tuple[str, ...]
    probabilities: Tensor
    selected: Tensor
    threshold: Tensor | None
    mask: Tensor | None


def stack_records(records: Iterable[RoutingRecord]) -> list[StackedRouting]:
    """Group records of equal shape and masks, and stack each group."""
    groups: dict[Any, list[RoutingRecord]] = {}
    for record in records:
        side = record.masks.encoder_decoder and _reads_decoder(record.layer)
        groups.setdefault((record.routing.logits.shape, id(record.masks), side), []).append(record)
    return [_stack(group) for group in groups.values()]


def _stack(records: list[RoutingRecord]) -> StackedRouting:
    first = records[0]
    mask = first.mask
    lead = (1,) if first.routing.logits.ndim == 2 else ()

    def column(name: str) -> Tensor:
        return torch.stack(
            [getattr(record.routing, name).reshape(*lead, *first.routing.logits.shape[:-1], -1) for record in records]
        )

    return StackedRouting(
        tuple(record.layer for record in records),
        column("probabilities"),
        column("selected"),
        None if first.routing.threshold is None else column("threshold"),
        None if mask is None else mask.reshape(*lead, *mask.shape),
    )
