"""Parameter penalty: use small experts where they do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from molora.losses.tokens import as_linears, shares


def parameter_penalty(
    probabilities: Tensor,
    selected: Tensor,
    sizes: Sequence[int],
    mask: Tensor | None = None,
    scope: str = "sequence",
) -> Tensor:
    """HMoE's parameter penalty of each linear, for experts of unequal size (arXiv 2408.10681).

    `L = E · Σ_e M_e P_e`, with `M_e` the mean over tokens of "selected e", times the size of e over the mean size (no
    gradient), and `P_e` the mean share of probability. With equal ranks it is `load_balancing` times the number of
    experts a token selects: K when all is even, E at most; so it also presses a selection of varying number down.
    One expert alone that takes everything costs E times its relative size.

    The paper's size is the hidden dimension of an expert, here it is its rank. It is divided by the mean size, which
    keeps the value near that of `load_balancing`; the paper's coefficient of 0.1 goes with undivided sizes.

    Args:
        probabilities: `[L, B, S, E]` for L linears, `[B, S, E]`, or `[T, E]` which counts as one sequence. Further
            columns are null experts, which cost nothing and take their share of probability.
        selected: Boolean, the experts each token kept; same shape.
        sizes: Rank of each of the E experts.
        mask: Boolean `[B, S]` or `[T]`, true for tokens that count; `None` for all.
        scope: `"sequence"` takes `M` and `P` within each sequence and averages over sequences; `"batch"` takes them
            over all tokens of the micro-batch, as the paper does.

    Returns:
        `[L]`, fp32: one value per linear, `[1]` for inputs without L. Zero if no token counts.
    """
    num_experts = len(sizes)
    given, real = as_linears(shares(probabilities)[..., :num_experts], mask)
    kept, _ = as_linears(selected[..., :num_experts].to(given.dtype), mask)
    given, kept = ((values * real.unsqueeze(-1)).sum(dim=-2) for values in (given, kept))  # [L, B, E]
    tokens = real.sum(dim=-1)  # [B]
    if scope == "batch":
        given, kept = given.sum(dim=1, keepdim=True), kept.sum(dim=1, keepdim=True)
        tokens = tokens.sum(dim=0, keepdim=True)
    size = torch.tensor(sizes, dtype=given.dtype, device=given.device)
    penalty = kept * (size / size.mean()).nan_to_num(1.0)
    per_sequence = num_experts * (penalty.detach() * given).sum(dim=-1) / tokens.clamp(min=1).square()
    return per_sequence.sum(dim=-1) / (tokens > 0).sum().clamp(min=1)
