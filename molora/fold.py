"""A bank whose mixing weights are fixed is one plain LoRA: `B' A'`. Pure functions, one for each layout.

Each takes A and B over all experts, the weights `[E]` with those of shared experts behind them (`None` for one each)
and the rank map, and returns A' `[r', in]` and B' `[out, r']` in the precision of the inputs. Where weights are zero
nothing is kept, so that a task that uses two of eight experts gets their ranks only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from molora.experts import RankMap

Factors = tuple[Tensor, Tensor]


def fold_separate(lora_a: Tensor, lora_b: Tensor, weights: Tensor | None, ranks: RankMap) -> Factors:
    """`Σ_e w_e s_e B_e A_e`: the gate is multiplied into B, `[R, in]` and `[out, R]`."""
    gate = ranks(weights)
    if not isinstance(gate, Tensor):
        return lora_a, lora_b * gate
    kept = gate != 0
    return lora_a[kept], lora_b[:, kept] * gate[kept]


def fold_shared_a(lora_a: Tensor, lora_b: Tensor, weights: Tensor | None, ranks: RankMap) -> Factors:
    """`(Σ_e w_e s_e B_e) A`, `[r, in]` and `[out, r]`."""
    by_expert = lora_b.unflatten(1, (len(ranks.ranks), -1))
    return lora_a, torch.einsum("oer,e->or", by_expert, _scaled(weights, ranks, lora_b))


def fold_pairs(lora_a: Tensor, lora_b: Tensor, weights: Tensor | None, ranks: RankMap) -> Factors:
    """`B Gᵀ A` with the weights laid out as `G [r₁, r₂]`; multiplied into the side that keeps the rank small."""
    table = _scaled(weights, ranks, lora_b).unflatten(0, (len(lora_a), -1))
    if lora_b.shape[1] <= len(lora_a):
        return table.T @ lora_a, lora_b
    return lora_a, lora_b @ table.T


def fold_factors(lora_a: Tensor, lora_b: Tensor, weights: Tensor | None, ranks: RankMap) -> Factors:
    """`(Σ_e w_e s_e B_e)(Σ_e w_e A_e)`, `[r, in]` and `[out, r]`."""
    if weights is None:
        weights = torch.ones(len(ranks.ranks), dtype=lora_a.dtype, device=lora_a.device)
    down = torch.einsum("eri,e->ri", lora_a.unflatten(0, (len(ranks.ranks), -1)), weights)
    up = torch.einsum("oer,e->or", lora_b.unflatten(1, (len(ranks.ranks), -1)), ranks.scaled(weights))
    return down, up


def fold_split_factors(lora_a: Tensor, lora_b: Tensor, weights: Tensor | None, ranks: RankMap) -> Factors:
    """As `fold_factors`, part by part of input and output; weights are `[splits, E]`."""
    assert weights is not None
    splits, experts = len(weights), len(ranks.ranks)
    parts = lora_a.unflatten(0, (experts, -1)).unflatten(2, (splits, -1))
    down = torch.einsum("erqi,qe->rqi", parts, weights).flatten(1)
    parts = lora_b.unflatten(0, (splits, -1)).unflatten(2, (experts, -1))
    up = torch.einsum("qoer,qe->qor", parts, ranks.scaled(weights)).flatten(0, 1)
    return down, up


def _scaled(weights: Tensor | None, ranks: RankMap, like: Tensor) -> Tensor:
    weights = torch.ones(len(ranks.ranks), dtype=like.dtype, device=like.device) if weights is None else weights
    return ranks.scaled(weights)
