"""Weights: how much each kept expert counts. One pure function each, chosen by name (`weights` in the config)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def probability(probabilities: Tensor, level: float | Tensor) -> Tensor:
    """The probability itself, `[..., E]`."""
    return probabilities


def probability_minus_threshold(probabilities: Tensor, level: float | Tensor) -> Tensor:
    """How far the probability lies above the threshold, `[..., E]` (AdaMoLE, arXiv 2405.00361, eq. 7).

    This is the only path by which the threshold gets a gradient.
    """
    return probabilities - level


WEIGHTS: dict[str, Callable[[Tensor, float | Tensor], Tensor]] = {
    "probability": probability,
    "probability_minus_threshold": probability_minus_threshold,
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
