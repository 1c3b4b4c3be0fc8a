"""Load: give all experts the same expected number of tokens, for a router with noise."""

from __future__ import annotations

import torch
from torch import Tensor

from molora.losses.tokens import as_linears, squared_variation
from molora.routing.precision import promote


def load(clean_logits: Tensor, logits: Tensor, selected: Tensor, noise: float, mask: Tensor | None = None) -> Tensor:
    """The load loss of each linear (Shazeer et al. 2017, arXiv 1701.06538, eq. 8 to 11).

    `L = CV²(Load)`, the population variance over the squared mean, with `Load_e = Σ_t P_te` and
    `P_te = Φ((clean_te - h_te) / σ)`: the probability that token t would keep expert e if only the noise of e were
    drawn again. `h_te` is what e must beat, the k-th largest noisy logit of the other experts: the largest of the
    unselected ones if e is selected, the smallest of the selected ones if it is not. Unlike a count of selections it
    has a gradient. Zero when all experts expect the same, about `E / k - 1` when k experts get every token. The
    paper's coefficient is 0.1 together with `importance`; 0.01 is milder.

    Differs from the paper in σ, which is one number here and not learned per expert. Selections that are no top-k of
    the noisy logits, as with a capacity, are taken as if they were.

    Args:
        clean_logits: Before the noise, `[L, B, S, E]` for L linears, `[B, S, E]` or `[T, E]`.
        logits: After it; same shape.
        selected: Boolean, the experts each token kept, by the noisy logits; same shape.
        noise: σ, the standard deviation of the noise. At 0, where a schedule may end, nothing is uncertain: the loads
            are the counts of selections, without a gradient.
        mask: Boolean `[B, S]` or `[T]`, true for tokens that count; `None` for all.

    Returns:
        `[L]`, fp32: one value per linear, `[1]` for inputs without L. Zero if no token counts.
    """
    if noise > 0:
        noisy = promote(logits)
        # If all are selected there is nothing to beat, and every expert is certain.
        in_if_above = noisy.masked_fill(selected, -torch.inf).amax(dim=-1, keepdim=True)
        kept_from = noisy.masked_fill(~selected, torch.inf).amin(dim=-1, keepdim=True)
        probability = torch.special.ndtr(
            (promote(clean_logits) - torch.where(selected, in_if_above, kept_from)) / noise
        )
    else:
        probability = selected.to(promote(logits).dtype)
    probability, real = as_linears(probability, mask)
    return squared_variation((probability * real.unsqueeze(-1)).sum(dim=(1, 2)))
