"""Routing contrastive: let each expert's row of the router point to the tokens it gets, and away from the others'."""

from __future__ import annotations

import torch
from torch import Tensor

from molora.losses.gram import unit
from molora.routing.precision import full_precision, promote


def routing_contrastive(rows: Tensor, token_sums: Tensor, counts: Tensor, temperature: float = 0.07) -> Tensor:
    """ProMoE's routing contrastive loss of each linear (Routing Matters in MoE, arXiv 2510.24711).

    `L = mean_i( -log( exp(s_ii / τ) / Σ_j exp(s_ij / τ) ) )` over the experts i, j that got a token, with
    `s_ij = cos(c_i, μ_j)` for `c_i` the row (or prototype) of expert i and `μ_j` the mean of the tokens that selected
    j. About 0 when each row points to the mean of its own tokens and these differ; `log E` when all means are alike,
    and more when rows point to the tokens of others. It takes the place of a balancing loss.

    Differs from the authors' code, whose tokens carry a gradient too: here they are detached (see `token_sums`), or
    every linear's loss would pull at all adapters below it. Their coefficient is 1, for image models trained whole; an
    adapter should begin with 0.05. A linear router has no prototypes, so its weight rows take their place.

    Args:
        rows: One per expert, `[L, E, d]`.
        token_sums: Sum of the tokens that selected each expert, `[L, E, d]`, from `token_sums`.
        counts: How many there were, `[L, E]`.
        temperature: τ.

    Returns:
        `[L]`, fp32: one value per linear. Zero if fewer than two experts got tokens.
    """
    rows = promote(rows)
    with full_precision(rows):
        # A mean and a sum have the same direction.
        scores = unit(rows) @ unit(token_sums).to(rows.dtype).mT / temperature  # [L, E, E]
    used = counts > 0
    # The own score of an unused expert stays: a row that is masked whole has a softmax, and a gradient, of NaN.
    own = torch.eye(counts.shape[-1], dtype=torch.bool, device=counts.device)
    allowed = used.unsqueeze(-2) | own
    lost = torch.logsumexp(scores.masked_fill(~allowed, -torch.inf), dim=-1) - scores.diagonal(dim1=-2, dim2=-1)
    return (lost * used).sum(dim=-1) / used.sum(dim=-1).clamp(min=1)


def token_sums(x: Tensor, selected: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What `routing_contrastive` needs of a linear's tokens, taken while it runs so that they need not be kept.

    Args:
        x: Input of the router, `[..., d]`.
        selected: Boolean, the experts each token kept, `[..., E]`.
        mask: Boolean `[...]`, true for tokens that count; `None` for all.

    Returns:
        Sum of the tokens that selected each expert `[E, d]`, and their number `[E]`; fp32 at least, without gradient.
    """
    tokens = promote(x.detach()).flatten(0, -2)
    kept = (selected if mask is None else selected & mask.bool().unsqueeze(-1)).flatten(0, -2).to(tokens.dtype)
    with full_precision(tokens):
        return kept.mT @ tokens, kept.sum(dim=0)
