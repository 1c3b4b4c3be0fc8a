"""How experts share the matrices of a bank: what the hidden `A x` becomes before B. One pure function each.

Every function takes the hidden, the mixing weights `[..., E]` (`None` for one each), the rank map and the activation,
and returns what B is multiplied with. Weights are in fp32 or fp64 and promote the hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from molora.experts import RankMap

Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Activation] = {"gelu": F.gelu, "silu": F.silu, "relu": F.relu}


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
    scaled = weights * torch.tensor(ranks.scales, dtype=weights.dtype, device=weights.device)
    return (scaled.unsqueeze(-1) * mixed.unsqueeze(-2)).flatten(-2)


@dataclass(frozen=True)
class Layout:
    """One way to share the matrices of a bank.

    Attributes:
        gated: From the hidden to what B is multiplied with.
        rows: Rows of A, given the ranks of the experts and `r` of the config.
        columns: Columns of B, likewise.
        blocks: Columns of B that belong together when it is drawn.
    """

    gated: Callable[[Tensor, Tensor | None, RankMap, Activation | None], Tensor]
    rows: Callable[[tuple[int, ...], int | list[int]], int] = lambda ranks, r: sum(ranks)
    columns: Callable[[tuple[int, ...], int | list[int]], int] = lambda ranks, r: sum(ranks)
    blocks: Callable[[tuple[int, ...], int | list[int]], tuple[int, ...]] = lambda ranks, r: ranks


LAYOUTS: dict[str, Layout] = {
    "separate": Layout(separate),
    "shared_A": Layout(shared_a, rows=lambda ranks, r: ranks[0]),
    "pairs": Layout(
        pairs,
        rows=lambda ranks, r: r[0],  # type: ignore[index]  # checked: a pair of numbers
        columns=lambda ranks, r: r[1],  # type: ignore[index]
        blocks=lambda ranks, r: (r[1],),  # type: ignore[index]
    ),
    "factors": Layout(factors),
    "shards": Layout(separate),
}
"""`shards`: one expert whose vectors are put together from pools (MoS); nothing is mixed."""
