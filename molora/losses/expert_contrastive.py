"""Expert contrastive: set the experts a token uses apart from those it does not."""

from __future__ import annotations

import torch
from torch import Tensor

from molora.losses.gram import mean_of_pairs, sampled_output_cosines


def expert_contrastive(
    z: Tensor,
    up: Tensor,
    selected: Tensor,
    expert_of_column: Tensor,
    mask: Tensor | None = None,
    temperature: float = 0.1,
    max_tokens: int | None = 256,
) -> Tensor:
    """CoMoE's contrastive loss of each linear, between the outputs of experts (arXiv 2505.17553, eq. 10 to 13).

    For a token's activated expert i and every other activated p, with the inactive experts N of that token:
    `-log( exp(s_ip / τ) / (exp(s_ip / τ) + Σ_{n ∈ N} exp(s_in / τ)) )`, with `s_ij = cos(e_i, e_j)` the cosine of two
    experts' outputs; the mean over p, then over tokens and i. Tokens with fewer than two activated experts, or with
    none inactive, do not count. `log(1 + |N|)` when all outputs are alike or all zero, about 0 when a token's
    activated experts agree and the inactive ones are orthogonal or opposed.

    The outputs are never computed: their products follow from the hidden and `BᵀB`, see `gram.py`. While B is zero
    there is no gradient. The paper's coefficient is 0.01; it found 0.1 and more to hurt. Differs from the paper in the
    cosine (it writes a dot product), in τ, which it does not tell, in the mean over positives (it writes one), and in
    sampling tokens instead of negatives.

    Args:
        z: Hidden `A x`, `[L, T, C]` for L linears and C rank columns, before any expert's weight.
        up: B, `[L, out, C]`.
        selected: Boolean, the experts each token kept, `[L, T, E]`.
        expert_of_column: The expert of each column, `[C]`; columns of experts beyond E count for none.
        mask: Boolean `[T]`, true for tokens that count; `None` for all.
        temperature: τ.
        max_tokens: How many tokens are looked at, drawn at random and the same for all linears; `None` for all.

    Returns:
        `[L]`, fp32: one value per linear. Zero if no token counts.
    """
    cosines, active = sampled_output_cosines(z, up, selected, expert_of_column, mask, max_tokens)
    scores = cosines / temperature  # [L, T, E, E]
    others = active.sum(dim=-1) - 1  # [L, T]
    counts = ((others > 0) & (others + 1 < active.shape[-1])).unsqueeze(-1)  # [L, T, 1]
    # Only where a token counts, and so has an inactive expert: the logsumexp of nothing has a gradient of NaN.
    no_negative = (active & counts).unsqueeze(-2)
    negative = torch.logsumexp(scores.masked_fill(no_negative, -torch.inf), dim=-1, keepdim=True)
    lost = torch.logaddexp(scores, negative) - scores
    used = active & counts
    same = torch.eye(active.shape[-1], dtype=torch.bool, device=active.device)
    pairs = (used.unsqueeze(-1) & used.unsqueeze(-2) & ~same) / others.clamp(min=1)[..., None, None]
    return mean_of_pairs(lost, pairs)
