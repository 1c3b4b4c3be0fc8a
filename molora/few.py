"""A handful of tokens without gradients, as in decoding: what counts is how little is done besides the products.

Stacking matrices would copy more than one read of the input saves, so each is multiplied as it is. A single token on a
CPU, where asking for a number waits for nothing, reads the matrices of the experts it chose and no others.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from molora.kernels.choices import Choices
from molora.kernels.dispatch import FEW_EXPERTS, FEW_IN_TRAINING, FEW_TOKENS, SPARED_RANKS
from molora.kernels.mixture import mixing_weights
from molora.observe import hand_on
from molora.routing.precision import autocast_enabled
from molora.routing.weights import with_shared
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
    most = FEW_IN_TRAINING if layer.training else FEW_TOKENS
    if x.numel() > most * layer.in_features or layer.molora_plan[name].gives_hidden:
        return None
    parts = standard_of(layer, name)
    if parts is None or drops(layer, name) or autocast_enabled(x):
        return None
    down, up = parts.down, parts.up
    if down.dtype != up.dtype:
        return None
    y = layer._modules["base_layer"](x, *args, **kwargs)
    if x.numel() == layer.in_features and y.dtype == x.dtype == up.dtype and _reads_few(layer, name, parts, x):
        return _of_own_experts(layer, name, x, y.reshape(-1), parts).view(y.shape)
    flat, out = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    weights = _weights(layer, name, x, parts)
    hidden = F.linear(flat.to(up.dtype), down).unflatten(-1, (weights.shape[-1], -1))
    gated = (hidden * weights.unsqueeze(-1)).to(hidden.dtype).flatten(-2)
    if out.dtype == gated.dtype:
        return torch.addmm(out, gated, up.T, alpha=parts.scale).view(y.shape)
    return (out + F.linear(gated, up) * parts.scale).to(y.dtype).view(y.shape)


def _reads_few(layer: Any, name: str, parts: Standard, x: Tensor) -> bool:
    """Whether one token's own experts are so few that reading nothing of the others is worth its steps."""
    choices = parts.choices
    if choices.selection != "top_k" or choices.top_k > FEW_EXPERTS or x.device.type != "cpu":
        return False
    simple = choices.gate == "softmax" and choices.renormalize and not choices.minus_threshold
    experts, ranks = choices.bank(parts.router.weight.shape[0]), parts.down.shape[0]
    spared = ranks - (choices.top_k + choices.shared_experts) * (ranks // experts)
    return simple and spared >= SPARED_RANKS and name not in layer.molora_group


def _of_own_experts(layer: Any, name: str, x: Tensor, y: Tensor, parts: Standard) -> Tensor:
    """`y + B (g ⊙ A x)` for one token of a CPU, `[out]`, reading the matrices of its own experts."""
    down, up, router = parts.down, parts.up, parts.router
    token, routed = x.reshape(-1), router.weight.shape[0]
    logits = router.of_few(token)
    weights, experts = _top_k(logits, parts.choices, None if parts.bias is None else parts.bias())
    if layer.routing_recorder is not None:
        dense = torch.zeros_like(logits).scatter_(0, experts, weights)
        hand_on(layer, name, x, logits, with_shared(dense, parts.choices.shared_experts, "one"), None)
    rank = down.shape[0] // parts.choices.bank(routed)
    if parts.choices.shared_experts:
        first = routed * rank
        y = torch.addmv(y, up[:, first:], torch.mv(down[first:], token), alpha=parts.scale)
    for expert, weight in zip(experts.tolist(), weights.tolist(), strict=True):
        first = expert * rank
        hidden = torch.mv(down[first : first + rank], token)
        y = torch.addmv(y, up[:, first : first + rank], hidden, alpha=weight * parts.scale)
    return y


def _top_k(logits: Tensor, choices: Choices, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights and numbers of the chosen experts, `[..., K]`, where they are renormalised softmax probabilities."""
    logits = logits if choices.temperature == 1 else logits / choices.temperature
    if bias is None:
        values, experts = logits.topk(choices.top_k)
    else:
        experts = (torch.softmax(logits, dim=-1) + bias.to(logits.dtype)).topk(choices.top_k).indices
        values = logits.gather(-1, experts)
    # Dividing the chosen probabilities by their sum is the softmax over the chosen logits.
    return torch.softmax(values, dim=-1), experts


def _weights(layer: Any, name: str, x: Tensor, parts: Standard) -> Tensor:
    """Mixing weights `[T, ALL]`, decided here or by the module that this one routes with."""
    if parts.follows:
        call = None if layer.routing_scope is None else layer.routing_scope.current()
        weights = layer.molora_group[name].take(name, call, x.shape[:-1]).weights
        return weights.reshape(x.shape[:-1].numel(), weights.shape[-1])
    features, router = x.reshape(-1, x.shape[-1]), parts.router
    logits = router.of_few(features)
    threshold = None if parts.threshold is None else parts.threshold.of_few(features)
    weights = weights_of_few(logits, threshold, None if parts.bias is None else parts.bias(), parts.choices)
    hand_on(layer, name, x, logits, weights, threshold)
    return weights


def weights_of_few(logits: Tensor, threshold_logit: Tensor | None, bias: Tensor | None, choices: Choices) -> Tensor:
    """`mixing_weights` in fewer steps for the most common choices; equal but for rounding.

    Args:
        logits: `[T, E]`.
        threshold_logit: `[T, 1]`.
        bias: `[E]`, the balancing bias.
        choices: The routing choices.
    """
    if choices.gate == "softmax" and choices.renormalize:
        if choices.selection == "top_k" and not choices.minus_threshold:
            weights, experts = _top_k(logits, choices, bias)
            kept = torch.zeros_like(logits).scatter_(1, experts, weights)
            return with_shared(kept, choices.shared_experts, "one")
        simple = bias is None and choices.minus_threshold and choices.temperature == 1
        if threshold_logit is not None and simple:
            level = torch.sigmoid(threshold_logit).mul_(choices.max_threshold)
            kept = torch.softmax(logits, dim=-1).sub_(level).relu_()
            kept.div_(kept.sum(dim=-1, keepdim=True).clamp_(min=torch.finfo(kept.dtype).tiny))
            return with_shared(kept, choices.shared_experts, "one")
    empty = logits.new_empty(0)
    return mixing_weights(logits, empty if threshold_logit is None else threshold_logit, bias, choices)
