"""The plain-torch form of the one product molora is about. Every faster form is tested against this one.

Layout: a bank packs all experts of one linear, expert after expert: `A [R, in]`, `B [out, R]`, R the sum of the
experts' ranks. With the mixing weight of each expert repeated over its ranks (`rank_gate [..., R]`), the mixture
`Σ_e w_e s_e B_e A_e x` is exactly `B (rank_gate ⊙ (A x))`: two matrix products, no loop over experts.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Product = Callable[[Tensor], Tensor]
"""Multiplies by one matrix of a bank. Called rather than read, as FSDP and offloading hold its values only then."""


def gated_lora(x: Tensor, lora_a: Product, lora_b: Product, rank_gate: Tensor | float) -> Tensor:
    """Compute `B (rank_gate ⊙ (A x))`.

    Args:
        x: Input, `[..., in]`, in the dtype of the weights unless autocast is on.
        lora_a: Product with `A [R, in]`.
        lora_b: Product with `B [out, R]`.
        rank_gate: Weight times scale of each rank: `[..., R]`, `[R]`, or one number for all ranks.

    Returns:
        `[..., out]`, in the dtype of the product (that of the weights, or autocast's).
    """
    # An fp32 gate promotes a 16-bit hidden; without autocast the second product needs equal dtypes.
    return lora_b((lora_a(x) * rank_gate).to(x.dtype))
