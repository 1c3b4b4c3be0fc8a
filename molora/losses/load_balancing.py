"""Load balancing: keep all experts in use."""

from __future__ import annotations

import torch
from torch import Tensor

from molora.losses.tokens import first_selected, shares


def load_balancing(
    probabilities: Tensor,
    selected: Tensor,
    mask: Tensor | None = None,
    scope: str = "sequence",
    count: str = "selected",
    null_experts: int = 0,
) -> Tensor:
    """Switch Transformer's load-balancing loss of one linear (arXiv 2101.03961, eq. 4).

    `L = E · Σ_e f_e P_e`, with `f_e` the share of all selections that fell on expert e (no gradient) and `P_e` the
    mean share of probability it was given. Exactly 1 when both are even, E when everything falls on one expert.
    Differs from Switch in that `f` counts every selected expert, not only the first, and both are shares, so the
    value does not grow with the number of selected experts and means the same for gates that do not sum to one.

    Null experts (AdaMoE, arXiv 2406.13233) count among the E, and each has the mean load of all null experts as its
    `f`: they are copies of one another, so only their common load is balanced.

    Args:
        probabilities: `[L, B, S, E]` for L linears, `[B, S, E]`, or `[T, E]` which counts as one sequence.
        selected: Boolean, the experts each token kept; same shape.
        mask: Boolean `[B, S]` or `[T]`, true for tokens that count; `None` for all.
        scope: `"sequence"` takes `f` and `P` within each sequence and averages over sequences, which makes the
            gradient of one batch of 8 and of 8 accumulated batches of one the same; `"batch"` takes them over all
            tokens of the micro-batch, as Switch does.
        count: `"selected"` counts every selected expert in `f`; `"first"` the most probable of them only, as Switch
            and GShard do.
        null_experts: How many of the E, at the end, are null experts.

    Returns:
        Scalar, fp32: the mean over linears, each on its own (pooling them would call eight collapsed linears balanced
        when each collapsed onto another expert). Zero if no token counts.
    """
    num_experts = probabilities.shape[-1]
    given = shares(probabilities)
    kept = (first_selected(probabilities, selected) if count == "first" else selected).to(given.dtype)
    if mask is not None:
        given, kept = given * mask.unsqueeze(-1), kept * mask.unsqueeze(-1)
    given, kept = given.sum(dim=-2), kept.sum(dim=-2)  # [L, B, E]
    if scope == "batch" and given.ndim > 1:
        given, kept = given.sum(dim=-2), kept.sum(dim=-2)  # [L, E]
    if null_experts:
        true, null = kept.split([num_experts - null_experts, null_experts], dim=-1)
        kept = torch.cat([true, null.mean(dim=-1, keepdim=True).expand_as(null)], dim=-1)
    tokens = given.sum(dim=-1, keepdim=True)
    share_given = given / tokens.clamp(min=torch.finfo(given.dtype).tiny)
    # Averaged null loads make counts fractional, but their sum is a whole number still.
    share_kept = kept / kept.sum(dim=-1, keepdim=True).clamp(min=1)
    per_sequence = num_experts * (share_kept.detach() * share_given).sum(dim=-1)
    # A sequence of nothing but padding counts neither above nor below.
    return per_sequence.sum() / (tokens > 0).sum().clamp(min=1)
