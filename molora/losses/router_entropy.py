"""Router entropy: make the router sure of itself."""

from __future__ import annotations

from torch import Tensor

from molora.losses.tokens import as_linears, entropy, mean_over_tokens, shares


def router_entropy(probabilities: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean entropy of the tokens' probabilities of each linear, minimised (Dynamic MoE, arXiv 2403.07652; HMoE).

    `L = mean_t( -Σ_e p_te log p_te )` in nats. `log E` when a token's probabilities are even, zero when they fall on
    one expert. Selections by cumulative probability need it: without it the router learns flat probabilities, which
    activate every expert. It says nothing about the balance between experts.

    Args:
        probabilities: `[L, B, S, E]` for L linears, `[B, S, E]` or `[T, E]`.
        mask: Boolean `[B, S]` or `[T]`, true for tokens that count; `None` for all.

    Returns:
        `[L]`, fp32: one value per linear, `[1]` for inputs without L. Zero if no token counts.
    """
    given, real = as_linears(shares(probabilities), mask)
    return mean_over_tokens(entropy(given), real)
