"""What statistics of routing say about its health, in sentences with remedies."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from molora.routing.statistics import DEAD_BELOW, RoutingTally

MIN_TOKENS_PER_EXPERT = 50
"""Fewer tokens than this many times the number of experts say nothing yet."""

MANY_DEAD = 0.25
"""Share of all experts that may be dead without a warning."""

COLLAPSED_ABOVE = 0.95
"""A linear is collapsed when the experts it takes to make up one token's choice have this share of all selections."""


def routing_problems(tally: RoutingTally) -> Iterator[tuple[str, str]]:
    """Say what looks wrong, each with a short name, so that it can be said once.

    Args:
        tally: The selections of some steps of training.
    """
    enough = tally.tokens >= MIN_TOKENS_PER_EXPERT * tally.num_experts
    several = tally.num_experts > 1
    judged = enough & several
    if not bool(judged.any()):
        return
    dead = _dead(tally) & judged.unsqueeze(-1)
    experts = int(tally.num_experts[judged].sum())
    if int(dead.sum()) > MANY_DEAD * experts:
        yield (
            "dead",
            f"{int(dead.sum())} of {experts} experts get less than {DEAD_BELOW:.0%} of an even share of tokens, most "
            f"in {_worst(tally, dead.sum(dim=-1))}. Set balance_bias_rate, or a load_balancing loss, or raise its "
            "coefficient.",
        )
    collapsed = _collapsed(tally) & judged
    if bool(collapsed.any()):
        yield (
            "collapsed",
            f"{int(collapsed.sum())} of {int(judged.sum())} routers send nearly all tokens to the same experts, as in "
            f"{_worst(tally, collapsed.float())}; such a mixture is a plain LoRA of these experts. Lower the learning "
            "rate, or set balance_bias_rate or a load_balancing loss.",
        )


def _dead(tally: RoutingTally) -> Tensor:
    """Boolean `[L, E]`."""
    even = 1 / tally.num_experts.clamp(min=1).unsqueeze(-1)
    exists = torch.arange(tally.selected.shape[-1], device=even.device) < tally.num_experts.unsqueeze(-1)
    return (tally.load() < DEAD_BELOW * even) & exists


def _collapsed(tally: RoutingTally) -> Tensor:
    """Boolean `[L]`: as many experts as a token uses get nearly everything, and there are more."""
    used = (tally.selected.sum(dim=-1) / tally.tokens.clamp(min=1)).round().clamp(min=1)
    ordered = tally.load().sort(dim=-1, descending=True).values.cumsum(dim=-1)
    last = (used.long() - 1).clamp(max=ordered.shape[-1] - 1)
    share = ordered.gather(-1, last.unsqueeze(-1)).squeeze(-1)
    return (share > COLLAPSED_ABOVE) & (used < tally.num_experts)


def _worst(tally: RoutingTally, badness: Tensor) -> str:
    return repr(tally.layers[int(badness.argmax())])
