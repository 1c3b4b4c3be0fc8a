"""Loss-free balancing: a bias that makes overloaded experts harder to select."""

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
