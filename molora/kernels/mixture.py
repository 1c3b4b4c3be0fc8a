"""The fused operation in plain torch, forward and backward by hand: the kernels' twin, and what runs on CPUs.

Forward, with `[T, ...]` tokens, ALL experts of equal rank r, E of them routed and the last shared, R = ALL·r:

    h = x Aᵀ        z = x Wᵀ + bias        t = x vᵀ + bias (adaptive threshold)
    p = gate(z / temperature)              level = max_threshold · sigmoid(t), or a number
    v = p or p − level where selected      w = v / Σv if renormalised and Σv > 0, else v; 1 for shared experts
    y' = y + (scale · repeat(w, r) ⊙ h) Bᵀ

Backward, with gy and the gradients that auxiliary losses send into logits, threshold logit and weights:

    dhg = gy B      dh = scale · repeat(w, r) ⊙ dhg        dw += scale · Σ_r dhg ⊙ h
    dv = (dw − Σ w dw) / Σv, or dw; zero where not selected
    dz += p (dv − Σ p dv) / temperature (softmax), dv p (1 − p) / temperature (sigmoid)
    dt += −Σ dv · level · (1 − sigmoid(t))
    dA = dhᵀ x      dW = dzᵀ x      dv = dtᵀ x      dB = gyᵀ (scale · repeat(w, r) ⊙ h)
    dx = gy W₀ + dh A + dz W + dt v

A selected expert whose weight is zero by rounding gets the smallest normal number, so that `weights != 0` says exactly
which experts were selected, here and for whoever counts them.

Precision: routing is in fp32, or fp64 if x is. In 16 bits dh, dz and dt are rounded to x's dtype for their part of dx,
as is the router; the gradients of router and threshold row are products of unrounded dz and dt, in fp32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from molora.kernels.choices import Choices
from molora.routing.weights import with_shared


class Forward(NamedTuple):
    """What the forward pass gives.

    Attributes:
        y: `[T, out]`.
        h: The hidden before the gate, `[T, R]`, in x's dtype.
        logits: `[T, E]`.
        threshold_logit: `[T, 1]`, or empty.
        weights: `[T, ALL]`.
    """

    y: Tensor
    h: Tensor
    logits: Tensor
    threshold_logit: Tensor
    weights: Tensor


class Saved(NamedTuple):
    """What the backward pass reads: parameters, x, and the forward pass's `h`, logits, threshold logit and weights."""

    x: Tensor
    a: Tensor
    router: Tensor
    b: Tensor
    threshold_row: Tensor | None
    base_weight: Tensor | None
    h: Tensor
    logits: Tensor
    threshold_logit: Tensor
    weights: Tensor


class Needs(NamedTuple):
    """Which gradients are asked for; the threshold's row and bias count as the router's."""

    x: bool = True
    a: bool = True
    router: bool = True
    b: bool = True


class Gradients(NamedTuple):
    """Gradients, `None` where not asked for. `router` is `[E + 1, in]` and `bias` `[E + 1]` with a threshold row."""

    x: Tensor | None
    a: Tensor | None
    router: Tensor | None
    bias: Tensor | None
    b: Tensor | None


def mixture_forward(
    x: Tensor,
    y: Tensor,
    a: Tensor,
    router: Tensor,
    b: Tensor,
    router_bias: Tensor | None,
    threshold_row: Tensor | None,
    threshold_bias: Tensor | None,
    balance_bias: Tensor | None,
    scale: float,
    choices: Choices,
    in_place: bool,
) -> Forward:
    """Add a mixture to y.

    Args:
        x: `[T, in]`.
        y: `[T, out]`, in x's dtype.
        a: `[R, in]`, in x's dtype.
        router: `[E, in]`, in x's dtype or fp32.
        b: `[out, R]`, in x's dtype.
        router_bias: `[E]`.
        threshold_row: `[1, in]`, for `adaptive_threshold`.
        threshold_bias: `[1]`.
        balance_bias: `[E]`, added to the probabilities when experts are ranked.
        scale: Factor of every expert.
        choices: How logits become weights.
        in_place: Whether to write into y.
    """
    exact = _exact(x.dtype)
    wide = x.to(exact)
    h = x @ a.t()
    logits = wide @ router.to(exact).t()
    if router_bias is not None:
        logits += router_bias.to(exact)
    threshold_logit = logits.new_empty(0)
    if threshold_row is not None:
        threshold_logit = wide @ threshold_row.to(exact).t()
        if threshold_bias is not None:
            threshold_logit += threshold_bias.to(exact)
    weights = mixing_weights(logits, threshold_logit, balance_bias, choices)
    gated = _gated(h, weights, scale)
    out = y.addmm_(gated, b.t()) if in_place else torch.addmm(y, gated, b.t())
    return Forward(out, h, logits, threshold_logit, weights)


def mixing_weights(logits: Tensor, threshold_logit: Tensor, balance_bias: Tensor | None, choices: Choices) -> Tensor:
    """Turn logits into mixing weights, `[T, ALL]`.

    Args:
        logits: `[T, E]` in fp32 or fp64.
        threshold_logit: `[T, 1]`, or empty without a learned threshold.
        balance_bias: `[E]`, added to the probabilities when experts are ranked.
        choices: The routing choices.
    """
    exact = logits.dtype
    p, level = _gate(logits, choices), _level(threshold_logit, choices)
    kept = _selected(p if balance_bias is None else p + balance_bias.to(exact), level, choices)
    values = (p - level if choices.minus_threshold else p).masked_fill(~kept, 0.0)
    if choices.renormalize:
        total = values.sum(dim=-1, keepdim=True)
        values = values / torch.where(total > 0, total, 1.0)
    weights = values.masked_fill(kept & (values == 0), torch.finfo(exact).tiny)
    return with_shared(weights, choices.shared_experts, "one")


def mixture_backward(
    saved: Saved,
    gy: Tensor,
    dlogits: Tensor | None,
    dthreshold: Tensor | None,
    dweights: Tensor | None,
    scale: float,
    choices: Choices,
    needs: Needs = Needs(),  # noqa: B008  # immutable
) -> Gradients:
    """Differentiate `mixture_forward`.

    Args:
        saved: What the forward pass left.
        gy: Gradient of `y'`, `[T, out]`.
        dlogits: Gradient of the logits that comes from elsewhere, `[T, E]`.
        dthreshold: Likewise of the threshold logit, `[T, 1]`.
        dweights: Likewise of the weights, `[T, ALL]`.
        scale: As in the forward pass.
        choices: As in the forward pass.
        needs: Which gradients to compute.
    """
    x, weights = saved.x, saved.weights
    exact = _exact(x.dtype)
    dhg = (gy @ saved.b).to(exact)
    per_expert = (dhg * saved.h).unflatten(-1, (weights.shape[-1], -1)).sum(dim=-1)
    dw = per_expert * scale if dweights is None else dweights.to(exact) + per_expert * scale
    dh = _gated(dhg, weights, scale).to(x.dtype)
    dz = routing_backward(dw, saved, dlogits, dthreshold, choices)
    rows = saved.router if saved.threshold_row is None else torch.cat([saved.router, saved.threshold_row])
    dx = None
    if needs.x:
        small, stacked = torch.cat([dh, dz.to(x.dtype)], dim=-1), torch.cat([saved.a, rows.to(x.dtype)])
        dx = small @ stacked if saved.base_weight is None else torch.addmm(gy @ saved.base_weight, small, stacked)
    return Gradients(
        dx,
        dh.t() @ x if needs.a else None,
        dz.t() @ x.to(exact) if needs.router else None,
        dz.sum(dim=0) if needs.router else None,
        gy.t() @ _gated(saved.h, weights, scale) if needs.b else None,
    )


def routing_backward(
    dw: Tensor, saved: Saved, dlogits: Tensor | None, dthreshold: Tensor | None, choices: Choices
) -> Tensor:
    """Gradient of logits and threshold logit, `[T, E]` or `[T, E + 1]`, from that of the weights `[T, ALL]`."""
    routed = saved.logits.shape[-1]
    dw, weights, p = dw[:, :routed], saved.weights[:, :routed], _gate(saved.logits, choices)
    level, kept = _level(saved.threshold_logit, choices), weights != 0
    if choices.renormalize:
        total = (p - level if choices.minus_threshold else p).masked_fill(~kept, 0.0).sum(dim=-1, keepdim=True)
        # The weights sum to one exactly where they were divided by a positive sum.
        divided = weights.sum(dim=-1, keepdim=True) > 0.5
        total = torch.where(divided, total.clamp(min=torch.finfo(total.dtype).tiny), 1.0)
        dw = torch.where(divided, dw - (weights * dw).sum(dim=-1, keepdim=True), dw) / total
    dp = dw.masked_fill(~kept, 0.0)
    dz = dp * p * (1 - p) if choices.gate == "sigmoid" else p * (dp - (p * dp).sum(dim=-1, keepdim=True))
    dz = dz / choices.temperature
    if dlogits is not None:
        dz = dz + dlogits
    if not isinstance(level, Tensor):
        return dz
    dt = torch.zeros_like(level) if dthreshold is None else dthreshold.to(level.dtype)
    if choices.minus_threshold:
        dt = dt - dp.sum(dim=-1, keepdim=True) * level * (1 - torch.sigmoid(saved.threshold_logit))
    return torch.cat([dz, dt], dim=-1)


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _gated(h: Tensor, weights: Tensor, scale: float) -> Tensor:
    """Every rank's hidden times its expert's weight and the scale, `[T, R]`, in h's dtype."""
    by_expert = h.unflatten(-1, (weights.shape[-1], -1))
    return (by_expert * (weights * scale).unsqueeze(-1)).to(h.dtype).flatten(-2)


def _gate(logits: Tensor, choices: Choices) -> Tensor:
    z = logits / choices.temperature
    return torch.sigmoid(z) if choices.gate == "sigmoid" else torch.softmax(z, dim=-1)


def _level(threshold_logit: Tensor, choices: Choices) -> Tensor | float:
    """`[T, 1]`, or one number."""
    return choices.max_threshold * torch.sigmoid(threshold_logit) if choices.adaptive else choices.threshold


def _selected(keys: Tensor, level: Tensor | float, choices: Choices) -> Tensor:
    """Boolean `[T, E]`. Of equals the first counts as better, on every device."""
    if choices.selection == "dense":
        return torch.ones_like(keys, dtype=torch.bool)
    if choices.selection in ("threshold", "adaptive_threshold"):
        return keys >= level
    ordered, order = keys.sort(dim=-1, descending=True, stable=True)
    best = torch.arange(keys.shape[-1], device=keys.device)
    if choices.selection == "top_k":
        kept = (best < choices.top_k).expand_as(keys)
    else:
        share = ordered / ordered.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(keys.dtype).tiny)
        kept = (share.cumsum(dim=-1) - share < choices.top_p) | (best == 0)
    return torch.zeros_like(keys, dtype=torch.bool).scatter(-1, order, kept)
