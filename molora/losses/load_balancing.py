"""Load balancing: keep all experts in use."""

from __future__ import annotations

import torch
from torch import Tensor

from molora.losses.tokens import as_linears, first_selected, shares


def load_balancing(
    probabilities: Tensor,
    selected: Tensor,
    mask: Tensor | None = None,
    scope: str = "sequence",
    count: str = "selected",
    null_experts: int = 0,
    counts: Tensor | None = None,
    tokens: Tensor | None = None,
) -> Tensor:
    """Switch Transformer's load-balancing loss of each linear (arXiv 2101.03961, eq. 4).

    `L = E · Σ_e f_e P_e`, with `f_e` the share of all selections that fell on expert e (no gradient) and `P_e` the
    mean share of probability it was given. Exactly 1 when both are even, E when everything falls on one expert, and
    E / K when on the same K, of which each has the same probability.
    Differs from Switch in that `f` counts every selected expert, not only the first, and both are shares, so the
    value does not grow with the number of selected experts and means the same for gates that do not sum to one.

    Null experts (AdaMoE, arXiv 2406.13233) count among the E, and each has the mean load of all null experts as its
    `f`: they are copies of one another, so only their common load is balanced.

    With scope `"global"` (Demons in the Detail, arXiv 2501.11873) `f` is that of all processes and of all
    micro-batches of the step so far, and P is local, which lets a micro-batch of one kind of text keep to few experts.
    As in Megatron, early micro-batches of a step see the counts up to themselves only, so with gradient accumulation
    the gradient is close to that of the whole batch, not equal.

    Args:
        probabilities: `[L, B, S, E]` for L linears, `[B, S, E]`, or `[T, E]` which counts as one sequence.
        selected: Boolean, the experts each token kept; same shape.
        mask: Boolean `[B, S]` or `[T]`, true for tokens that count; `None` for all.
        scope: `"sequence"` takes `f` and `P` within each sequence and averages over sequences, which makes the
            gradient of one batch of 8 and of 8 accumulated batches of one the same; `"batch"` takes them over all
            tokens of the micro-batch, as Switch does; `"global"` takes `f` from `counts`.
        count: `"selected"` counts every selected expert in `f`; `"first"` the most probable of them only, as Switch
            and GShard do.
        null_experts: How many of the E, at the end, are null experts.
        counts: For scope `"global"`, the selections of each expert `[L, E]`, `count` by the same rule, summed over
            processes and micro-batches; `None` for those of this micro-batch, as in scope `"batch"`.
        tokens: For scope `"global"`, the mean number per process of this micro-batch's real tokens that gave any
            probability, a scalar or `[L]`: then the mean gradient over processes is that of their tokens together.
            `None` for this process's own.

    Returns:
        `[L]`, fp32: one value per linear, each on its own (pooling them would call eight collapsed linears balanced
        when each collapsed onto another expert), `[1]` for inputs without L. Zero if no token counts.
    """
    given, real = as_linears(shares(probabilities), mask)
    kept, _ = as_linears((first_selected(probabilities, selected) if count == "first" else selected).to(given), mask)
    given, kept = ((values * real.unsqueeze(-1)).sum(dim=2) for values in (given, kept))  # [L, B, E]
    if scope != "sequence":
        given, kept = given.sum(dim=1, keepdim=True), kept.sum(dim=1, keepdim=True)  # [L, 1, E]
    own = given.sum(dim=-1, keepdim=True)
    divisor = own
    if scope == "global":
        kept = kept if counts is None else counts.to(kept).reshape(kept.shape)
        divisor = own if tokens is None else tokens.to(own).reshape(-1, 1, 1).expand_as(own)
    if null_experts:
        true, null = kept.split([given.shape[-1] - null_experts, null_experts], dim=-1)
        kept = torch.cat([true, null.mean(dim=-1, keepdim=True).expand_as(null)], dim=-1)
    share_given = given / torch.where(divisor > 0, divisor, 1.0)
    # Averaged null loads make counts fractional, but their sum is a whole number still.
    share_kept = kept / kept.sum(dim=-1, keepdim=True).clamp(min=1)
    per_sequence = given.shape[-1] * (share_kept.detach() * share_given).sum(dim=-1)  # [L, B]
    # A sequence of nothing but padding counts neither above nor below.
    return per_sequence.sum(dim=-1) / (own > 0).sum(dim=(1, 2)).clamp(min=1)
