"""Weights: how much each kept expert counts. One pure function each, chosen by name (`weights` in the config)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scored:
    """What a weighing may read about one decision.

    Attributes:
        logits: `[..., E]`, after temperature-free modifications such as noise and external scores.
        probabilities: `[..., E]`, the gate's output.
        keys: `[..., E]`, what experts were ranked by: probabilities plus the balancing bias.
        selected: Boolean `[..., E]`.
        level: Threshold: one number, or `[..., 1]`.
        temperature: Divides logits.
        scores: External scores, broadcastable to `[..., E]`, or `None`.
        mix: Share of the router against the external scores, `[1]`, or `None`.
        coefficients: Factors of the router's and of the external share.
    """

    logits: Tensor
    probabilities: Tensor
    keys: Tensor
    selected: Tensor
    level: float | Tensor
    temperature: float
    scores: Tensor | None = None
    mix: Tensor | None = None
    coefficients: tuple[float, float] = (1.0, 1.0)


def probability(scored: Scored) -> Tensor:
    """The probability itself, `[..., E]`."""
    return scored.probabilities


def probability_minus_threshold(scored: Scored) -> Tensor:
    """How far the probability lies above the threshold, `[..., E]` (AdaMoLE, arXiv 2405.00361, eq. 7).

    This is the only path by which the threshold gets a gradient.
    """
    return scored.probabilities - scored.level


def biased_probability(scored: Scored) -> Tensor:
    """Probability plus balancing bias, `[..., E]` (SMoRA, arXiv 2501.15103, as released)."""
    return scored.keys


def selected_softmax(scored: Scored) -> Tensor:
    """Softmax of the logits over the kept experts only, `[..., E]` (BECoTTA, arXiv 2402.08712; Arrow, 2405.11157)."""
    logits = (scored.logits / scored.temperature).masked_fill(~scored.selected, -torch.inf)
    # A token that kept nothing has only -inf, whose softmax and its gradient are NaN.
    logits = torch.where(scored.selected.any(dim=-1, keepdim=True), logits, 0.0)
    return torch.softmax(logits, dim=-1)


def one(scored: Scored) -> Tensor:
    """Every kept expert counts fully, `[..., E]`."""
    return torch.ones_like(scored.probabilities)


def blend(scored: Scored) -> Tensor:
    """Router and external scores, `c₁·m·p + c₂·(1 − m)·scores` with a learned m (MoR1E, arXiv 2404.08985)."""
    if scored.scores is None or scored.mix is None:
        raise ValueError("weights 'blend' need external scores and a mix")
    ours, theirs = scored.coefficients
    return ours * scored.mix * scored.probabilities + theirs * (1 - scored.mix) * scored.scores


WEIGHTS: dict[str, Callable[[Scored], Tensor]] = {
    "probability": probability,
    "probability_minus_threshold": probability_minus_threshold,
    "biased_probability": biased_probability,
    "selected_softmax": selected_softmax,
    "one": one,
    "blend": blend,
}


def keep_selected(values: Tensor, selected: Tensor, renormalize: bool) -> Tensor:
    """Zero the experts that were not selected and, if asked, make the rest sum to one.

    A token that selected nothing gets all zeros, never NaN.

    Args:
        values: `[..., E]`.
        selected: Boolean `[..., E]`.
        renormalize: Divide by the sum over the selected experts.

    Returns:
        Mixing weights `[..., E]`.
    """
    kept = values.masked_fill(~selected, 0.0)
    if not renormalize:
        return kept
    total = kept.sum(dim=-1, keepdim=True)
    return kept / torch.where(total > 0, total, 1.0)


def with_shared(weights: Tensor, shared_experts: int, rule: str) -> Tensor:
    """Append the weights of the shared experts, which every token uses.

    Args:
        weights: Weights of the routed experts, `[..., E]`.
        shared_experts: How many to append.
        rule: `"one"`, or `"remainder"` for what the routed weights leave of one (MoCLE, arXiv 2312.12379).

    Returns:
        `[..., E + shared_experts]`.
    """
    if not shared_experts:
        return weights
    ones = torch.ones_like(weights[..., :1])
    shared = ones if rule == "one" else ones - weights.sum(dim=-1, keepdim=True)
    return torch.cat([weights, shared.expand(*weights.shape[:-1], shared_experts)], dim=-1)
