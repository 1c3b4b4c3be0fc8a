"""Importance: give all experts the same total weight."""

from __future__ import annotations

from torch import Tensor

from molora.losses.tokens import as_linears, squared_variation


def importance(weights: Tensor, mask: Tensor | None = None) -> Tensor:
    """The importance loss of each linear (Shazeer et al. 2017, arXiv 1701.06538, eq. 7).

    `L = var(I) / mean(I)²`, with `I_e = Σ_t w_te` the mixing weight that expert e got over the micro-batch, and the
    population variance. Zero when all experts got the same, `E - 1` when one got everything. The gradient reaches
    only the experts a token selected.

    Args:
        weights: `[L, B, S, E]` for L linears, `[B, S, E]` or `[T, E]`; zero where not selected.
        mask: Boolean `[B, S]` or `[T]`, true for tokens that count; `None` for all.

    Returns:
        `[L]`, fp32: one value per linear, `[1]` for inputs without L. Zero if no token counts.
    """
    mixed, real = as_linears(weights, mask)
    return squared_variation((mixed * real.unsqueeze(-1)).sum(dim=(1, 2)))
