"""What the losses share: shapes, padding, and probabilities as shares."""

from __future__ import annotations

import torch
from torch import Tensor

from molora.routing.precision import promote


def shares(probabilities: Tensor) -> Tensor:
    """Scale each token's probabilities to sum to one, which those of a sigmoid gate do not; in fp32 at least."""
    given = promote(probabilities)
    # A sigmoid gate can underflow to zero for every expert of a token.
    return given / given.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(given.dtype).tiny)


def first_selected(probabilities: Tensor, selected: Tensor) -> Tensor:
    """The most probable of each token's selected experts alone, boolean `[..., E]`; none where none is selected."""
    best = probabilities.detach().masked_fill(~selected, -torch.inf).argmax(dim=-1, keepdim=True)
    return torch.zeros_like(selected).scatter(-1, best, True) & selected


def as_linears(values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Bring decisions and mask to the full shape.

    Args:
        values: `[L, B, S, E]`, `[B, S, E]` for one linear, or `[T, E]` which counts as one sequence.
        mask: Boolean `[B, S]` or `[T]`; `None` for all.

    Returns:
        The values `[L, B, S, E]` in fp32 at least, and the mask `[B, S]` in the same type.
    """
    values = promote(values).reshape((1,) * (4 - values.ndim) + values.shape)
    shape = values.shape[1:3]
    return values, values.new_ones(shape) if mask is None else mask.to(values.dtype).reshape(shape)


def mean_over_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """Average `[L, B, S]` over linears and the tokens of `mask` [B, S]; zero if no token counts."""
    return (values * mask).sum() / (mask.sum() * len(values)).clamp(min=1)


def squared_variation(values: Tensor) -> Tensor:
    """Squared coefficient of variation over the last dimension, population variance; zero where all are zero."""
    mean = values.mean(dim=-1)
    variance = (values - mean.unsqueeze(-1)).square().mean(dim=-1)
    return variance / mean.square().clamp(min=torch.finfo(values.dtype).tiny)
