"""Selections: which experts a token keeps. One pure function each, chosen by name (`selection` in the config).

Every function takes the probabilities `[..., E]` and returns a boolean mask of the same shape. A mask carries no
gradient; the router learns through the weights of the experts that were kept.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def dense(probabilities: Tensor) -> Tensor:
    """Keep every expert (LoRAMoE, arXiv 2312.09979; MoLORA, arXiv 2309.05444)."""
    return torch.ones_like(probabilities, dtype=torch.bool)


def top_k(probabilities: Tensor, k: int) -> Tensor:
    """Keep the `k` most probable experts, exactly `k` of them even on ties (arXiv 1701.06538)."""
    kept = probabilities.topk(k, dim=-1).indices
    return torch.zeros_like(probabilities, dtype=torch.bool).scatter(-1, kept, True)


def top_p(probabilities: Tensor, p: float) -> Tensor:
    """Keep the fewest most probable experts whose share of the total reaches `p` (arXiv 2403.07652).

    The share is taken of the token's total, so the rule means the same for gates that do not sum to one. The most
    probable expert is always kept.
    """
    ordered, order = probabilities.sort(dim=-1, descending=True)
    share = ordered / ordered.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(ordered.dtype).tiny)
    kept = share.cumsum(dim=-1) - share < p
    kept = kept | (torch.arange(kept.shape[-1], device=kept.device) == 0)
    return torch.zeros_like(kept).scatter(-1, order, kept)


def threshold(probabilities: Tensor, level: float | Tensor) -> Tensor:
    """Keep the experts whose probability is at least `level` (AdaMoLE, arXiv 2405.00361, eq. 6).

    Args:
        probabilities: `[..., E]`.
        level: One number for all tokens, or one per token as `[..., 1]`. May leave a token without any expert.
    """
    return probabilities >= level


SELECTIONS: dict[str, Callable[..., Tensor]] = {
    "dense": dense,
    "top_k": top_k,
    "top_p": top_p,
    "threshold": threshold,
    "adaptive_threshold": threshold,
}
"""`adaptive_threshold` is `threshold` with a level that a small network reads from the token."""

SELECTION_OF_FIELD = {
    "top_k": "top_k",
    "top_p": "top_p",
    "threshold": "threshold",
    "max_threshold": "adaptive_threshold",
}
"""Config fields that only one selection reads."""
