"""L1 sparsity: let a ReLU gate activate as many experts as wanted, and all of them equally often."""

from __future__ import annotations

from torch import Tensor

from molora.losses.tokens import as_linears


def l1_sparsity(
    probabilities: Tensor, selected: Tensor, experts_per_token: float, mask: Tensor | None = None
) -> Tensor:
    """ReMoE's load-balancing L1 penalty of each linear, for ReLU gates (arXiv 2412.14711, eq. 10).

    `L = E · Σ_e F_e G_e`, with `F_e` the number of tokens that activated expert e over `T · k` (no gradient) and
    `G_e = mean_t g_te` the mean of its gate values: an L1 norm in which experts that are used more often weigh more.
    The gate values are no shares, so pressing them to zero is what makes tokens activate fewer experts. With k experts
    active per token and gates that sum to one it is 1 when all is even, and E if all tokens choose one expert, k = 1.

    The coefficient is not set but controlled, by `next_coefficient`, from 1e-8 on.

    Args:
        probabilities: The gate's output, `[L, B, S, E]` for L linears, `[B, S, E]` or `[T, E]`.
        selected: Boolean, the experts each token activated; same shape.
        experts_per_token: k, how many experts a token should activate on average.
        mask: Boolean `[B, S]` or `[T]`, true for tokens that count; `None` for all.

    Returns:
        `[L]`, fp32: one value per linear, `[1]` for inputs without L. Zero if no token counts.
    """
    given, real = as_linears(probabilities, mask)
    active, _ = as_linears(selected.to(given.dtype), mask)
    tokens = real.sum().clamp(min=1)
    often = (active * real.unsqueeze(-1)).sum(dim=(1, 2)) / (tokens * experts_per_token)  # [L, E]
    mean = (given * real.unsqueeze(-1)).sum(dim=(1, 2)) / tokens
    return given.shape[-1] * (often.detach() * mean).sum(dim=-1)


def next_coefficient(coefficient: float, active: float, experts_per_token: float, alpha: float = 1.2) -> float:
    """ReMoE's controller of the coefficient of `l1_sparsity` (arXiv 2412.14711, eq. 8), once per step.

    `λ ← λ · α^sign(active - k)`. The paper compares the share of idle experts with `1 - k / E`, which is the same.
    One coefficient for all linears, as in the authors' code.

    Args:
        coefficient: λ so far.
        active: How many experts a token activated, on average over the step, all linears and all processes.
        experts_per_token: k, how many it should be.
        alpha: α, above 1.

    Returns:
        λ of the next step: larger if too many were active, smaller if too few, the same if the number is met.
    """
    if active > experts_per_token:
        return coefficient * alpha
    return coefficient / alpha if active < experts_per_token else coefficient
