"""Consistency: let the model predict the same whichever experts were drawn."""

from __future__ import annotations

import torch
from torch import Tensor

from molora.losses.tokens import sample_tokens
from molora.routing.precision import promote


def consistency(logits: Tensor, other: Tensor, mask: Tensor | None = None, max_tokens: int | None = 256) -> Tensor:
    """THOR's consistency loss between two passes with different experts (arXiv 2110.04260, eq. 4).

    `L = mean_t( (KL(p_t || q_t) + KL(q_t || p_t)) / 2 )` in nats, with p and q the predictions of the two passes; both
    have a gradient. Zero when they predict the same, without bound when they contradict each other. It belongs to the
    whole model and not to a linear.

    Differs from the authors' code, which adds up tokens instead of taking the mean, and whose coefficient of 5 goes
    with that; 1 is the one to begin with.

    Args:
        logits: The model's predictions, `[..., V]` for a vocabulary of V.
        other: Those of the second pass; same shape.
        mask: Boolean `[...]`, true for tokens that count; `None` for all.
        max_tokens: How many tokens are looked at, drawn at random; `None` for all. The fp32 copies of the logits that
            this loss needs are as large as the number of tokens it looks at.

    Returns:
        Scalar, fp32. Zero if no token counts.
    """
    first, second = logits.flatten(0, -2), other.flatten(0, -2)  # [T, V]
    real = torch.ones(len(first), device=first.device) if mask is None else mask.flatten()
    drawn = sample_tokens(real, max_tokens)
    if drawn is not None:
        first, second, real = first[drawn], second[drawn], real[drawn]
    first, second = torch.log_softmax(promote(first), dim=-1), torch.log_softmax(promote(second), dim=-1)
    # Both divergences in one sum.
    apart = ((first.exp() - second.exp()) * (first - second)).sum(dim=-1) / 2
    real = real.to(apart.dtype)
    return (apart * real).sum() / real.sum().clamp(min=1)
