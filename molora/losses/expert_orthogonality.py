"""Expert orthogonality: let experts differ, in what they read, what they write, or what they say about a token."""

from __future__ import annotations

import torch
from torch import Tensor

from molora.losses.gram import mean_of_pairs, membership, sampled_output_cosines, unit
from molora.routing.precision import full_precision


def expert_orthogonality(matrix: Tensor, expert_of_row: Tensor, num_experts: int) -> Tensor:
    """How much the experts of each linear overlap: squared cosines between rows of different experts.

    `L = mean_{i ≠ j}( ||Â_i Â_jᵀ||²_F / (r_i r_j) )`, with `Â_i` the rows of expert i at length one. Zero when all
    rows of different experts are orthogonal, 1 when all rows of all experts are parallel, and `1 / n` on average for
    random rows of length n. A loss of parameters alone: it needs no token. GMoPE and others have constraints like it
    on vectors of experts; the scale-free form and the coefficient to begin with, 0.01, are molora's.

    Args:
        matrix: A, `[L, C, in]`, or Bᵀ, `[L, C, out]`, of L linears with C rank columns.
        expert_of_row: The expert of each row, `[C]`; rows of experts beyond E count for none.
        num_experts: E.

    Returns:
        `[L]`, fp32: one value per linear. Zero for one expert; rows of zero are orthogonal to all.
    """
    rows = unit(matrix)
    member = membership(expert_of_row, num_experts, rows)
    with full_precision(rows):
        overlap = member @ (rows @ rows.mT).square() @ member.mT  # [L, E, E]
    sizes = member.sum(dim=-1)
    # An expert without rows would be a pair of nothing.
    pairs = (sizes > 0).unsqueeze(-1) & (sizes > 0) & _different(num_experts, rows)
    mean = overlap / (sizes.unsqueeze(-1) * sizes).clamp(min=1)
    return mean_of_pairs(mean, pairs.to(mean.dtype).expand_as(mean))


def output_orthogonality(
    z: Tensor,
    up: Tensor,
    selected: Tensor,
    expert_of_column: Tensor,
    mask: Tensor | None = None,
    max_tokens: int | None = 256,
) -> Tensor:
    """How much the outputs of the experts a token selected overlap, for each linear.

    `L = mean( cos(e_i, e_j)² )` over tokens and ordered pairs `i ≠ j` of the experts they selected. Zero when the
    outputs are orthogonal, 1 when they are parallel; while B is zero it is 0 without a gradient. After the L_o of
    "Advancing Expert Specialization for Better MoE" (arXiv 2505.22323), which adds up projections of one output on
    another; squared cosines do not reward small outputs. The coefficient to begin with, 1e-3, is molora's.

    Args:
        z: Hidden `A x`, `[L, T, C]` for L linears and C rank columns, before any expert's weight.
        up: B, `[L, out, C]`.
        selected: Boolean, the experts each token kept, `[L, T, E]`.
        expert_of_column: The expert of each column, `[C]`; columns of experts beyond E count for none.
        mask: Boolean `[T]`, true for tokens that count; `None` for all.
        max_tokens: How many tokens are looked at, drawn at random and the same for all linears; `None` for all.

    Returns:
        `[L]`, fp32: one value per linear. Zero if no token selected two experts.
    """
    cosines, active = sampled_output_cosines(z, up, selected, expert_of_column, mask, max_tokens)
    pairs = active.unsqueeze(-1) & active.unsqueeze(-2) & _different(active.shape[-1], cosines)
    return mean_of_pairs(cosines.square(), pairs.to(cosines.dtype))


def _different(num_experts: int, like: Tensor) -> Tensor:
    """Boolean `[E, E]`, true for pairs of different experts."""
    return ~torch.eye(num_experts, dtype=torch.bool, device=like.device)
