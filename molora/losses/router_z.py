"""Router z: keep the logits small."""

from __future__ import annotations

import torch
from torch import Tensor

from molora.losses.tokens import as_linears, mean_over_tokens


def router_z(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """The router z-loss of each linear (ST-MoE, arXiv 2202.08906, eq. 5).

    `L = mean_t( logsumexp_e(l_te)² )`. `(log E)²` for logits of zero, and it grows with the square of large ones. It
    has no balance of its own, and routers with bounded logits, such as cosine ones, have no use for it.

    Args:
        logits: `[L, B, S, E]` for L linears, `[B, S, E]` or `[T, E]`.
        mask: Boolean `[B, S]` or `[T]`, true for tokens that count; `None` for all.

    Returns:
        `[L]`, fp32: one value per linear, `[1]` for inputs without L. Zero if no token counts.
    """
    values, real = as_linears(logits, mask)
    return mean_over_tokens(torch.logsumexp(values, dim=-1).square(), real)
