"""SparseMixer: sampled top-k routing whose router gets an estimate of the full gradient (GRIN, arXiv 2409.12136)."""

from __future__ import annotations

import torch
from torch import Tensor


def sparsemixer(logits: Tensor, k: int, jitter: float, training: bool) -> tuple[Tensor, Tensor]:
    """Choose `k` experts one after another, each among those close enough to the best that is left.

    An expert is close enough if `(max − l) / max(|l|, max) ≤ 2·jitter`. In training it is sampled from the softmax
    over those, and its weight is multiplied by 1 or 1/3 (Heun's third-order estimate) without touching the gradient,
    which stays that of the plain probability; at inference the best is taken. Weights do not sum to one.

    Args:
        logits: `[..., E]`.
        k: Experts to choose.
        jitter: Half the relative distance within which experts compete.
        training: Sample, or take the best.

    Returns:
        Boolean mask and weights, both `[..., E]`.
    """
    left = logits
    selected = torch.zeros_like(logits, dtype=torch.bool)
    weights = torch.zeros_like(logits)
    for _ in range(k):
        best = left.detach().max(dim=-1, keepdim=True).values
        some = best > -torch.inf  # else all are chosen or banned
        distance = (best - logits.detach()) / logits.detach().abs().clamp(min=best)
        near = left.masked_fill(distance > 2 * jitter, -torch.inf)
        probabilities = torch.softmax(torch.where(some, near, 0.0), dim=-1)
        top = probabilities.argmax(dim=-1, keepdim=True)
        chosen, factor = top, torch.ones_like(best)
        if training:
            chosen = (probabilities / torch.empty_like(logits).exponential_()).argmax(dim=-1, keepdim=True)
            whole = (chosen == top) | (torch.rand_like(best) > 0.75)
            factor = torch.where(whole, 1.0, 1 / 3).to(logits.dtype)
        weight = probabilities.gather(-1, chosen)
        weight = weight + (weight * factor - weight).detach()
        weights = weights.scatter(-1, chosen, torch.where(some, weight, weights.gather(-1, chosen)))
        selected = selected.scatter(-1, chosen, some | selected.gather(-1, chosen))
        left = left.masked_fill(selected, -torch.inf)
    return selected, weights
