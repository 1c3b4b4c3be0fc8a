"""Selections: which experts a token keeps. One pure function each, chosen by name (`selection` in the config).

Every function takes the keys `[..., E]` that experts are ranked by (the probabilities, plus the balancing bias if
there is one) and returns a boolean mask of the same shape. A mask carries no gradient; the router learns through the
weights of the experts that were kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def dense(keys: Tensor) -> Tensor:
    """Keep every expert (LoRAMoE, arXiv 2312.09979; MoLORA, arXiv 2309.05444)."""
    return torch.ones_like(keys, dtype=torch.bool)


def top_k(keys: Tensor, k: int) -> Tensor:
    """Keep the `k` most probable experts, exactly `k` of them even on ties (arXiv 1701.06538)."""
    kept = keys.topk(k, dim=-1).indices
    return torch.zeros_like(keys, dtype=torch.bool).scatter(-1, kept, True)


def top_k_magnitude(keys: Tensor, k: int) -> Tensor:
    """Keep the `k` experts whose key is largest in absolute value (FlyLoRA, arXiv 2510.08396)."""
    return top_k(keys.abs(), k)


def top_p(keys: Tensor, p: float) -> Tensor:
    """Keep the fewest most probable experts whose share of the total reaches `p` (arXiv 2403.07652).

    The share is taken of the token's total, so the rule means the same for gates that do not sum to one. The most
    probable expert is always kept.
    """
    ordered, order = keys.sort(dim=-1, descending=True)
    share = ordered / ordered.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(ordered.dtype).tiny)
    kept = share.cumsum(dim=-1) - share < p
    kept = kept | (torch.arange(kept.shape[-1], device=kept.device) == 0)
    return torch.zeros_like(kept).scatter(-1, order, kept)


def threshold(keys: Tensor, level: float | Tensor) -> Tensor:
    """Keep the experts whose probability is at least `level` (AdaMoLE, arXiv 2405.00361, eq. 6).

    Args:
        keys: `[..., E]`.
        level: One number for all tokens, or one per token as `[..., 1]`. May leave a token without any expert.
    """
    return keys >= level


def top_1_or_2(keys: Tensor, gap: float) -> Tensor:
    """Keep the best expert, and the second best if it lies less than `gap` behind (adaptive gating, 2310.07188)."""
    best, order = keys.topk(2, dim=-1)
    second = best[..., :1] - best[..., 1:] <= gap
    kept = torch.cat([torch.ones_like(second), second], dim=-1)
    return torch.zeros_like(keys, dtype=torch.bool).scatter(-1, order, kept)


def grouped_top_1(keys: Tensor, groups: int) -> Tensor:
    """Keep the best expert of each of `groups` equal groups (expert prototyping, M6-T, arXiv 2105.15082)."""
    return top_k(keys.unflatten(-1, (groups, -1)), 1).flatten(-2)


SELECTIONS: dict[str, Callable[..., Tensor]] = {
    "dense": dense,
    "top_k": top_k,
    "top_p": top_p,
    "threshold": threshold,
    "adaptive_threshold": threshold,
    "top_k_magnitude": top_k_magnitude,
    "top_1_or_2": top_1_or_2,
    "grouped_top_1": grouped_top_1,
    "sparsemixer": top_k,
}
"""`adaptive_threshold` is `threshold` with a level that a small network reads from the token; `sparsemixer` is `top_k`
at inference and samples in training (`molora.routing.sparsemixer`)."""

SELECTIONS_OF_FIELD = {
    "top_k": ("top_k", "top_k_magnitude", "sparsemixer"),
    "top_p": ("top_p",),
    "threshold": ("threshold",),
    "max_threshold": ("adaptive_threshold",),
    "top_gap": ("top_1_or_2",),
    "expert_groups": ("grouped_top_1",),
}
"""Config fields that only some selections read."""


def within_capacity(selected: Tensor, mask: Tensor | None, factor: float, per_token: int) -> Tensor:
    """Drop the tokens that come too late for a full expert (GShard, arXiv 2006.16668). Training only.

    Every expert takes at most `ceil(factor · T · K / E)` of the batch's T tokens, in their order.

    Args:
        selected: Boolean `[..., E]`.
        mask: Boolean `[...]`, true for real tokens, which alone take up room; `None` for all.
        factor: Room of an expert relative to an even load.
        per_token: K, the experts a token asks for.

    Returns:
        Boolean `[..., E]`, a subset of `selected`.
    """
    asked = selected if mask is None else selected & mask.unsqueeze(-1)
    flat = asked.flatten(0, -2)
    room = math.ceil(factor * flat.shape[0] * per_token / flat.shape[1])
    return (asked & (flat.cumsum(dim=0) <= room).reshape(asked.shape)) if room else torch.zeros_like(asked)
