"""A handful of tokens without gradients, as in decoding: what counts is how little is done besides the products.

Stacking matrices would copy more than one read of the input saves, so each is multiplied as it is. A single token of a
bank with many ranks reads the matrices of its own experts only, gathered by an index whose shape does not depend on
the data, so nothing waits for a device.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from molora.kernels.choices import Choices
from molora.kernels.dispatch import FEW_TOKENS, MANY_RANKS
from molora.kernels.mixture import mixing_weights
from molora.routing import fixed
from molora.routing.precision import autocast_enabled, promote
from molora.standard import Standard, drops, standard_of


def add_few(layer: Any, name: str, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The output of an adapted linear for few tokens, `[..., in]` to `[..., out]`; `None` if this is not such a case.

    For calls without gradients.

    Args:
        layer: The linear.
        name: Name of the one adapter.
        x: Its input.
        args: Further arguments of the frozen linear.
        kwargs: Likewise.
    """
    if x.numel() > FEW_TOKENS * layer.in_features or layer.routing_recorder is not None:
        return None
    parts = standard_of(layer, name)
    if parts is None or drops(layer, name) or autocast_enabled(x):
        return None
    down, up = parts.down, parts.up
    if down.dtype != up.dtype:
        return None
    flat = x.reshape(-1, x.shape[-1])
    weights = _weights(layer, name, flat, parts, x.shape[:-1])
    y = layer._modules["base_layer"](x, *args, **kwargs)
    flat, out = flat.to(up.dtype), y.reshape(-1, y.shape[-1])
    if len(out) == 1 and parts.choices.selection == "top_k" and len(down) >= MANY_RANKS:
        gated, up = of_own_experts(flat, down, up, weights, parts.choices.top_k)
    else:
        hidden = F.linear(flat, down).unflatten(-1, (weights.shape[-1], -1))
        gated = (hidden * weights.unsqueeze(-1)).to(hidden.dtype).flatten(-2)
    if out.dtype == gated.dtype:
        return torch.addmm(out, gated, up.T, alpha=parts.scale).view(y.shape)
    return (out + F.linear(gated, up) * parts.scale).to(y.dtype).view(y.shape)


def _weights(layer: Any, name: str, x: Tensor, parts: Standard, lead: torch.Size) -> Tensor:
    """Mixing weights `[T, E]`, decided here or by the module that this one routes with."""
    group = layer.molora_group.get(name)
    call = None if layer.routing_scope is None else layer.routing_scope.current()
    if parts.follows:
        return group.take(name, call).weights.flatten(0, -2)
    x, router = promote(x), parts.router
    bias = None if router.bias is None else router.bias.to(x.dtype)
    logits = F.linear(x, router.weight.to(x.dtype), bias)
    threshold = None if parts.threshold is None else parts.threshold(x)
    weights = weights_of_few(logits, threshold, None if parts.bias is None else parts.bias(), parts.choices)
    if group is not None and group.decides_once:
        group.put(name, call, fixed(weights.view(*lead, -1), per_sequence=False))
    return weights


def of_own_experts(x: Tensor, down: Tensor, up: Tensor, weights: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The gated hidden of one token, and what of B it is multiplied with, reading no other expert's matrices.

    Args:
        x: `[1, in]`.
        down: A, `[R, in]`.
        up: B, `[out, R]`.
        weights: `[1, E]`, zero for all but `top_k` experts at most.
        top_k: K.

    Returns:
        `[1, K·r]` and `[out, K·r]`.
    """
    rank = len(down) // weights.shape[1]
    chosen, experts = weights[0].topk(top_k)
    ranks = (experts.unsqueeze(-1) * rank + torch.arange(rank, device=x.device)).flatten()
    hidden = F.linear(x, down.index_select(0, ranks)).view(top_k, rank)
    gated = (hidden * chosen.unsqueeze(-1)).to(hidden.dtype).view(1, -1)
    return gated, up.index_select(1, ranks)


def weights_of_few(logits: Tensor, threshold_logit: Tensor | None, bias: Tensor | None, choices: Choices) -> Tensor:
    """`mixing_weights` in fewer steps for the most common choices; equal but for rounding.

    Args:
        logits: `[T, E]`.
        threshold_logit: `[T, 1]`.
        bias: `[E]`, the balancing bias.
        choices: The routing choices.
    """
    if bias is None and choices.gate == "softmax" and choices.renormalize:
        if choices.selection == "top_k" and not choices.minus_threshold:
            # Dividing the chosen probabilities by their sum is the softmax over the chosen logits.
            values, experts = logits.topk(choices.top_k)
            if choices.temperature != 1:
                values = values / choices.temperature
            return torch.zeros_like(logits).scatter_(1, experts, torch.softmax(values, dim=-1))
        if threshold_logit is not None and choices.minus_threshold and choices.temperature == 1:
            level = torch.sigmoid(threshold_logit).mul_(choices.max_threshold)
            kept = torch.softmax(logits, dim=-1).sub_(level).relu_()
            return kept.div_(kept.sum(dim=-1, keepdim=True).clamp_(min=torch.finfo(kept.dtype).tiny))
    empty = logits.new_empty(0)
    return mixing_weights(logits, empty if threshold_logit is None else threshold_logit, bias, choices)
