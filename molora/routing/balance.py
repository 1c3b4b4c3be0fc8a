"""Biases that steer by counts, without a loss: towards even load, and towards a number of active experts."""

from __future__ import annotations

import torch
from torch import Tensor


def balanced_bias(bias: Tensor, counts: Tensor, rate: float) -> Tensor:
    """Move a balancing bias one step: `b_e + u · sign(mean(c) - c_e)` (arXiv 2408.15664, alg. 1).

    The bias takes part in the selection of experts. Experts that were selected less often than the average become
    easier to select, the others harder, all by the same step; one at the average stays.

    Args:
        bias: `[E]`.
        counts: Times each expert was selected since the last step, `[E]`, whole numbers of any type.
        rate: The step u.

    Returns:
        The new bias `[E]`.
    """
    whole = counts.round().long()  # an average that is off by a rounding error would have a sign
    step = torch.sign(whole.sum() - whole * len(whole))
    return bias + rate * step.to(bias.dtype)


THRESHOLD_RATE = 0.1
"""Step of a threshold's logit for a factor e of too many active experts.

Fast enough to cross the middle of the sigmoid, from -2 to 2, in forty steps. Slow enough not to swing: where experts'
probabilities differ by a fifth, as those of a router at its start, a step of 0.1 changes how many are active by about
half of what they are off.
"""

_MOST = 8.0
"""Largest logit that is steered to: the threshold is within 0.04 % of its limit, and further steps would have to be
taken back one by one."""


def steered_threshold(bias: Tensor, active: Tensor, wanted: float, rate: float = THRESHOLD_RATE) -> Tensor:
    """Move the logit of a threshold one step: `b + u · clip(log(active / wanted), -1, 1)`, within ±8.

    More active experts than wanted raise the threshold. In proportion to the logarithm, as twice too many are as far
    off as half of them, and so that a threshold that is right comes to rest; clipped, as no expert may be active.

    Args:
        bias: `[1]`.
        active: Experts that a token used on average since the last step, a scalar.
        wanted: How many there should be.
        rate: The step u.

    Returns:
        The new logit `[1]`. One that is beyond ±8 already goes no further.
    """
    off = torch.log(active / wanted).clamp(-1.0, 1.0)
    bound = bias.abs().clamp(min=_MOST)
    return torch.clamp(bias + rate * off.to(bias.dtype), -bound, bound)
