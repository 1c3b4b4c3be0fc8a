"""The plain-torch form of the one product molora is about. Every faster form is tested against this one.

Layout: a bank packs all experts of one linear, expert after expert: `A [R, in]`, `B [out, R]`, R the sum of the
experts' ranks. With the mixing weight of each expert repeated over its ranks (`rank_gate [..., R]`), the mixture
`Σ_e w_e s_e B_e A_e x` is exactly `B (rank_gate ⊙ (A x))`: two matrix products, no loop over experts.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def gated_lora(x: Tensor, lora_a: Tensor, lora_b: Tensor, rank_gate: Tensor | float) -> Tensor:
    """Compute `B (rank_gate ⊙ (A x))`.

    Args:
        x: Input, `[..., in]`.
        lora_a: `[R, in]`.
        lora_b: `[out, R]`.
        rank_gate: Weight times scale of each rank: `[..., R]`, `[R]`, or one number for all ranks.

    Returns:
        `[..., out]`, in the dtype of the product (that of the weights, or autocast's).
    """
    hidden = F.linear(x, lora_a) * rank_gate
    # An fp32 gate promotes a 16-bit hidden; without autocast the second product needs equal dtypes.
    return F.linear(hidden.to(lora_b.dtype), lora_b)
