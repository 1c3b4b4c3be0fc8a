"""Batch entropy: keep all experts in use, without counting selections."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from molora.losses.tokens import as_linears, entropy, shares


def batch_entropy(probabilities: Tensor, mask: Tensor | None = None) -> Tensor:
    """How far the mean share of each linear is from even, in nats; a balancing loss.

    `L = log E - H(P)`, with `P_e` the mean share of probability that expert e was given over all real tokens of the
    micro-batch, and `H(P) = -Σ_e P_e log P_e`. Zero when the mean is even, `log E` when one expert is given
    everything. It is the KL divergence of P from even shares, and the gradient reaches every expert, selected or not.

    Not to be mixed up with `router_entropy`, which makes each single token sure of its experts: that entropy is
    minimised, this one maximised. Together they are the two halves of the `mutual_information` of token and expert
    (Mod-Squad, arXiv 2212.08066, with tokens in the place of tasks). Papers have it as a part of other losses; 0.01 is
    a coefficient to start from.

    Args:
        probabilities: `[L, B, S, E]` for L linears, `[B, S, E]` or `[T, E]`.
        mask: Boolean `[B, S]` or `[T]`, true for tokens that count; `None` for all.

    Returns:
        `[L]`, fp32: one value per linear, `[1]` for inputs without L. Zero if no token counts.
    """
    given, real = as_linears(shares(probabilities), mask)
    given = (given * real.unsqueeze(-1)).sum(dim=(1, 2))  # [L, E]
    tokens = given.sum(dim=-1, keepdim=True)
    any_token = tokens > 0
    mean = given / torch.where(any_token, tokens, 1.0)
    return math.log(given.shape[-1]) * any_token.squeeze(-1) - entropy(mean)
