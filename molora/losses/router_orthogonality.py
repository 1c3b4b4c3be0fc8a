"""Router orthogonality: let the router's rows ask different questions."""

from __future__ import annotations

from torch import Tensor

from molora.losses.gram import unit
from molora.routing.precision import full_precision


def router_orthogonality(rows: Tensor) -> Tensor:
    """Mean squared cosine between different rows of the router of each linear.

    `L = ||Ŵ Ŵᵀ - I||²_F / (E (E - 1))`, with `Ŵ` the rows at length one. Zero when they are orthogonal, 1 when all are
    parallel. After the orthogonal gates of LocMoE (arXiv 2401.13920) and DynMoE (arXiv 2405.14297). DynMoE wants the
    rows to have length one, too; here their length is free, and the mean over pairs makes the value independent of
    their number. The coefficient to begin with, 1e-3, is molora's.

    Args:
        rows: One per expert, `[L, E, d]`.

    Returns:
        `[L]`, fp32: one value per linear. Zero for one expert; rows of zero are orthogonal to all.
    """
    rows = unit(rows)
    num_experts = rows.shape[-2]
    with full_precision(rows):
        squares = (rows @ rows.mT).square()
    # Taking the identity away would count rows of zero as wrong.
    off_diagonal = squares.sum(dim=(1, 2)) - squares.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    return off_diagonal / max(num_experts * (num_experts - 1), 1)
