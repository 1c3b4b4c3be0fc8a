"""Adaptive coefficients: balance each linear as much as it needs."""

from __future__ import annotations

import torch
from torch import Tensor

from molora.routing.precision import promote


def adapted_coefficients(
    coefficients: Tensor,
    counts: Tensor,
    num_experts: Tensor | int,
    factor: float = 0.2,
    maximum: float = 0.01,
    decay: float = 0.99,
    capacity: float = 1.0,
) -> Tensor:
    """Skywork-MoE's coefficients of load balancing, one per linear (arXiv 2406.06563, section 4.2), once per step.

    `α ← β α + (1 - β) · min(ξ d, α_max)`, with d the share of tokens that the linear dropped in the step. Nothing is
    dropped here, so d is the share of selections that would be, if every expert had room for `capacity` times an even
    share: `d = Σ_e max(0, F_e - capacity / E)`, with `F_e` the share of selections that fell on expert e. It is 0 when
    all is even, and `1 - capacity / E` when one expert gets everything.

    Args:
        coefficients: α of each linear so far, `[L]`.
        counts: Selections of each expert over the step and all processes, `[L, E]`; zero in columns beyond a linear's
            experts.
        num_experts: How many experts each linear has, `[L]`, or one number for all.
        factor: ξ.
        maximum: α_max.
        decay: β.
        capacity: Room of an expert, in even shares.

    Returns:
        α of the next step, `[L]`. A linear that counted nothing keeps its own.
    """
    chosen = promote(counts.to(coefficients.dtype))
    total = chosen.sum(dim=-1, keepdim=True)
    room = capacity / torch.as_tensor(num_experts, dtype=chosen.dtype, device=chosen.device).reshape(-1, 1)
    dropped = (chosen / total.clamp(min=1) - room).clamp(min=0).sum(dim=-1)
    adapted = decay * coefficients + (1 - decay) * (factor * dropped).clamp(max=maximum)
    return torch.where(total.squeeze(-1) > 0, adapted, coefficients)
