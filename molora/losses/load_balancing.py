"""Load balancing: keep all experts in use."""

from __future__ import annotations

import torch
from torch import Tensor


def load_balancing(
    probabilities: Tensor, selected: Tensor, mask: Tensor | None = None, scope: str = "sequence"
) -> Tensor:
    """Switch Transformer's load-balancing loss of one linear (arXiv 2101.03961, eq. 4).

    `L = E · Σ_e f_e P_e`, with `f_e` the share of all selections that fell on expert e (no gradient) and `P_e` the
    mean share of probability it was given. Exactly 1 when both are even, E when everything falls on one expert.
    Differs from Switch in that `f` counts every selected expert, not only the first, and both are shares, so the
    value does not grow with the number of selected experts and means the same for gates that do not sum to one.

    Args:
        probabilities: `[B, S, E]`, or `[T, E]` which counts as one sequence.
        selected: Boolean, the experts each token kept; same shape.
        mask: Boolean `[B, S]` or `[T]`, true for tokens that count; `None` for all.
        scope: `"sequence"` takes `f` and `P` within each sequence and averages over sequences, which makes the
            gradient of one batch of 8 and of 8 accumulated batches of one the same; `"batch"` takes them over all
            tokens of the micro-batch, as Switch does.

    Returns:
        Scalar, fp32; zero if no token counts.
    """
    num_experts = probabilities.shape[-1]
    probabilities = probabilities.float()
    given = probabilities / probabilities.sum(dim=-1, keepdim=True)
    kept = selected.to(given.dtype)
    if mask is not None:
        given, kept = given * mask.unsqueeze(-1), kept * mask.unsqueeze(-1)
    if scope == "batch" or given.ndim == 2:
        given, kept = given.reshape(1, -1, num_experts), kept.reshape(1, -1, num_experts)
    given, kept = given.sum(dim=1), kept.sum(dim=1)  # [B, E]
    # A sequence of nothing but padding adds zero to numerator and denominator.
    real = (given.sum(dim=-1) > 0).to(given.dtype)
    share_given = given / given.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(given.dtype).tiny)
    share_kept = kept / kept.sum(dim=-1, keepdim=True).clamp(min=1)
    per_sequence = num_experts * (share_kept.detach() * share_given).sum(dim=-1)
    return per_sequence.sum() / real.sum().clamp(min=1)
