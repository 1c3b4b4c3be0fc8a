"""The plain-torch form of the products molora is about. Every faster form is to be tested against these.

Layout: a bank packs all experts of one module, expert after expert: `A [R, in]`, `B [out, R]`, R the sum of the
experts' ranks. With the mixing weight of each expert repeated over its ranks, the mixture `Σ_e w_e s_e B_e A_e x` is
exactly `B (rank_gate ⊙ (A x))`: two matrix products, no loop over experts. Here is what happens between the two: every
function takes the hidden `A x`, the mixing weights `[..., E]` (`None` for one each), the rank map and the activation,
and returns what B is multiplied with. Weights are in fp32 or fp64 and promote the hidden.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from molora.experts import RankMap

Activation = Callable[[Tensor], Tensor]


def separate(hidden: Tensor, weights: Tensor | None, ranks: RankMap, activation: Activation | None) -> Tensor:
    """Every expert has rows of A and columns of B of its own: `gate ⊙ h`, `[..., R]`."""
    return (hidden if activation is None else activation(hidden)) * ranks(weights)


def shared_a(hidden: Tensor, weights: Tensor | None, ranks: RankMap, activation: Activation | None) -> Tensor:
    """One A for all experts, columns of B for each: `gate ⊙ (h, h, …)`, `[..., r]` to `[..., E·r]` (HydraLoRA)."""
    hidden = hidden if activation is None else activation(hidden)
    gate = ranks(weights)
    tiled = torch.cat([hidden] * len(ranks.ranks), dim=-1)
    return tiled * gate


def pairs(hidden: Tensor, weights: Tensor | None, ranks: RankMap, activation: Activation | None) -> Tensor:
    """Every pair of a row of A and a column of B is an expert: `[..., r₁]` to `[..., r₂]` (MoR1E, arXiv 2404.08985).

    `z_j = Σ_i h_i G_ij` with the weights laid out as `G [r₁, r₂]`.
    """
    assert weights is not None
    hidden = hidden if activation is None else activation(hidden)
    table = weights.unflatten(-1, (hidden.shape[-1], -1)) * ranks.scales[0]
    return (hidden.to(table.dtype).unsqueeze(-2) @ table).squeeze(-2)


def factors(hidden: Tensor, weights: Tensor | None, ranks: RankMap, activation: Activation | None) -> Tensor:
    """The factors are mixed, not the products: `(Σ w_e s_e B_e) act(Σ w_e A_e x)` (Polytropon, SMEAR, LoraHub).

    No matrix is ever mixed: the hidden is summed over experts, and spread over them again for B. `[..., R]`.
    """
    assert weights is not None
    mixed = _mix(hidden, weights, ranks)
    return _spread(mixed if activation is None else activation(mixed), weights, ranks)


def split_factors(hidden: Tensor, weights: Tensor | None, ranks: RankMap, activation: Activation | None) -> Tensor:
    """As `factors`, with weights of its own for each part of input and output (MHR, arXiv 2211.03831).

    Args:
        hidden: `[..., splits, R]`, what each part of the input contributes.
        weights: `[..., splits, E]`.
        ranks: Rank map; all experts have the same rank.
        activation: Applied to the sum over parts.

    Returns:
        `[..., splits, R]`, the hidden of each part of the output.
    """
    assert weights is not None
    mixed = _mix(hidden, weights, ranks).sum(dim=-2, keepdim=True)
    return _spread(mixed if activation is None else activation(mixed), weights, ranks)


def _mix(hidden: Tensor, weights: Tensor, ranks: RankMap) -> Tensor:
    by_expert = hidden.unflatten(-1, (len(ranks.ranks), -1))
    return (weights.unsqueeze(-1) * by_expert).sum(dim=-2)


def _spread(mixed: Tensor, weights: Tensor, ranks: RankMap) -> Tensor:
    return (ranks.scaled(weights).unsqueeze(-1) * mixed.unsqueeze(-2)).flatten(-2)
