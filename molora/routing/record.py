"""Recording: hand the routing decisions of one forward to whoever asked, and nothing to nobody else.

A layer records when a recorder is attached, which only happens inside `record_routing`. The recomputation of gradient
checkpointing runs in the backward pass, after that block has closed, so it is never counted twice; neither is
generation, a reference model's pass, or anything else outside the block.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from molora.routing.route import Routing


@runtime_checkable
class Records(Protocol):
    """A layer that hands its routing decisions to `routing_recorder` when there is one."""

    routing_recorder: RoutingRecorder | None
    routing_name: str


@dataclass(frozen=True)
class RoutingRecord:
    """One routing decision with what is needed to judge it.

    Attributes:
        layer: Name of the linear inside the model.
        adapter: Name of the adapter.
        routing: The decision, tensors `[B, S, E]` or `[T, E]`, still attached to the graph.
        mask: Boolean `[B, S]` or `[T]`, true for real tokens; `None` when all are.
    """

    layer: str
    adapter: str
    routing: Routing
    mask: Tensor | None


class RoutingRecorder:
    """Collects the records of the forward passes that run while it is attached.

    Args:
        with_grad_only: Ignore passes under `torch.no_grad()`, such as a reference model's.
    """

    def __init__(self, with_grad_only: bool) -> None:
        self.records: list[RoutingRecord] = []
        self._with_grad_only = with_grad_only
        self._masks = TokenMasks()

    def append(self, layer: str, adapter: str, routing: Routing) -> None:
        """Called by a layer for each decision."""
        if self._with_grad_only and not torch.is_grad_enabled():
            return
        mask = mask_of_layer(self._masks, layer, routing.logits.shape[:-1])
        self.records.append(RoutingRecord(layer, adapter, routing, mask))

    def note_masks(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the whole model: remember which tokens of this pass are padding."""
        self._masks = token_masks(kwargs, bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False)))


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


def token_masks(kwargs: dict[str, Any], encoder_decoder: bool) -> TokenMasks:
    """Read the masks from a model's keyword arguments; a decoder without one takes the labelled positions."""
    of_decoder, labels = kwargs.get("decoder_attention_mask"), kwargs.get("labels")
    if encoder_decoder and of_decoder is None and labels is not None:
        of_decoder = labels != -100
    return TokenMasks(kwargs.get("attention_mask"), of_decoder, encoder_decoder)


def mask_of_layer(masks: TokenMasks, layer: str, shape: torch.Size) -> Tensor | None:
    """Find the mask that belongs to a layer's tokens.

    Args:
        masks: Masks of the forward pass.
        layer: Name of the linear; tells an encoder-decoder's two sides apart.
        shape: `[B, S]` or `[T]` of the layer's tokens.

    Returns:
        Boolean mask of that shape, or `None` if every token counts. With a key-value cache the mask is longer than the
        input, and its end is what belongs to it.
    """
    mask = masks.of_decoder if masks.encoder_decoder and _reads_decoder(layer) else masks.of_input
    if mask is None or mask.ndim != 2:
        return None
    if len(shape) == 2 and mask.shape[0] == shape[0] and mask.shape[1] >= shape[1]:
        return mask[:, mask.shape[1] - shape[1] :].bool()
    return mask.reshape(shape).bool() if mask.numel() == shape.numel() else None


def _reads_decoder(layer: str) -> bool:
    # Keys and values of cross-attention stand in the decoder and read the encoder's tokens.
    cross_key_value = re.search(r"(EncDecAttention|encoder_attn|crossattention)\.(.*\.)?(k|v|key|value)", layer)
    return re.search(r"(^|\.)decoder\.", layer) is not None and not cross_key_value


@contextmanager
def record_routing(model: nn.Module, with_grad_only: bool = False) -> Iterator[list[RoutingRecord]]:
    """Record the routing decisions of every forward of `model` inside the block.

    Args:
        model: Any model that contains molora layers; call it (not a submodule) so that padding is known.
        with_grad_only: Ignore passes under `torch.no_grad()`.

    Yields:
        The list that fills up, one record per linear, active adapter and forward.
    """
    recorder = RoutingRecorder(with_grad_only)
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, Records)]
    hook = model.register_forward_pre_hook(recorder.note_masks, with_kwargs=True)
    for name, layer in layers:
        layer.routing_name = name
        layer.routing_recorder = recorder
    try:
        yield recorder.records
    finally:
        hook.remove()
        for _, layer in layers:
            layer.routing_recorder = None
