"""Two passes over one batch, and how much their outputs agree: the loss `consistency` in any trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from molora.errors import MoloraError
from molora.losses import consistency
from molora.losses.tokens import sample_tokens
from molora.routing.masks import token_masks


@dataclass(frozen=True)
class ModelOutput:
    """What one forward pass gave.

    Attributes:
        values: Logits `[..., V]`, or last hidden states `[B, S, d]`.
        head: From hidden states to logits; `None` if `values` are logits.
        mask: Boolean `[...]`, true for real tokens; `None` for all.
    """

    values: Tensor
    head: Callable[[Tensor], Tensor] | None
    mask: Tensor | None


@contextmanager
def model_outputs(model: nn.Module, labels: Tensor | None = None) -> Iterator[list[ModelOutput]]:
    """Keep the output of every forward pass of a PEFT model inside the block that carries a gradient.

    A trainer with a fused head, as TRL's, never has the logits of all tokens; then the hidden states are kept.

    Args:
        model: The model.
        labels: Labels of the batch, if the model is not called with them; they show the padding of a decoder.
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    backbone = getattr(base, "base_model", base)
    outputs: list[ModelOutput] = []
    hidden: list[Tensor] = []

    def of_backbone(module: nn.Module, args: Any, output: Any) -> None:
        hidden[:] = [value] if isinstance(value := getattr(output, "last_hidden_state", None), Tensor) else []

    def of_model(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        logits = getattr(output, "logits", None)
        encoder_decoder = bool(getattr(base.config, "is_encoder_decoder", False))
        masks = token_masks({"labels": labels, **kwargs}, encoder_decoder)
        mask = masks.of_decoder if encoder_decoder else masks.of_input
        if not torch.is_grad_enabled():
            return
        if isinstance(logits, Tensor):
            outputs.append(ModelOutput(logits, None, _fitting(mask, logits)))
        elif hidden:
            outputs.append(ModelOutput(hidden[0], partial(_head, base), _fitting(mask, hidden[0])))

    handles = [base.register_forward_hook(of_model, with_kwargs=True)]
    if backbone is not base:
        handles.append(backbone.register_forward_hook(of_backbone))
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _head(base: Any, hidden: Tensor) -> Tensor:
    """From last hidden states to logits, scaled and capped as the model's own forward pass does."""
    config = base.config.get_text_config()
    logits = base.get_output_embeddings()(hidden)
    factors = (getattr(config, name, None) for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"))
    factor = next((value for value in factors if value is not None), None)
    if factor is None and (divisor := getattr(config, "logits_scaling", None)) is not None:
        factor = divisor if config.model_type == "hyperclovax" else 1 / divisor
    if factor is not None:
        logits = logits * factor
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _fitting(mask: Tensor | None, values: Tensor) -> Tensor | None:
    """A mask of tokens, if the values are about tokens."""
    return mask.bool() if isinstance(mask, Tensor) and mask.shape == values.shape[:-1] else None


def consistency_of(first: Sequence[ModelOutput], second: Sequence[ModelOutput], max_tokens: int) -> Tensor:
    """The loss `consistency` of two passes over the same batch, a mean over their forward passes.

    Args:
        first: Outputs of the first pass.
        second: Those of the second.
        max_tokens: How many positions are compared, drawn at random, for their logits take much memory.

    Raises:
        MoloraError: If the passes gave nothing to compare.
    """
    if not first or len(first) != len(second):
        raise MoloraError(
            "routing loss 'consistency' compares the logits of two passes, and the model gave "
            f"{len(first)} and {len(second)} outputs with logits; it does not fit this trainer."
        )
    if any(output.head is None and output.values.shape[-1] == 1 for output in first):
        raise MoloraError(
            "routing loss 'consistency' compares distributions, and the model gives a single number, as reward models "
            "do; leave it out."
        )
    values = [_compared(a, b, max_tokens) for a, b in zip(first, second, strict=True)]
    return torch.stack(values).mean()


def _compared(first: ModelOutput, second: ModelOutput, max_tokens: int) -> Tensor:
    pair = [output.values.flatten(0, -2) for output in (first, second)]
    mask = None if first.mask is None else first.mask.flatten()
    real = pair[0].new_ones(len(pair[0])) if mask is None else mask
    # Drawn before the head, so that a fused one need not give the logits of all tokens.
    drawn = sample_tokens(real, max_tokens)
    if drawn is not None:
        pair, real = [values[drawn] for values in pair], real[drawn]
    if first.head is not None:
        pair = [first.head(values) for values in pair]
    return consistency(pair[0], pair[1], real, max_tokens=None)
