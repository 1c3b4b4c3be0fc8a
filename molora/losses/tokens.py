"""What the losses share: shapes, padding, samples of tokens, and probabilities as shares."""

from __future__ import annotations

import torch
from torch import Tensor

from molora.routing.precision import promote


def shares(probabilities: Tensor) -> Tensor:
    """Scale each token's probabilities to sum to one, which those of a sigmoid gate do not; in fp32 at least."""
    given = promote(probabilities)
    total = given.sum(dim=-1, keepdim=True)
    # A sigmoid gate can underflow for every expert of a token, and a ReLU gate be zero: such a token gives no shares.
    # Dividing by less would let the gradient overflow, and times the zero of the gate it would be NaN.
    info = torch.finfo(given.dtype)
    return given / torch.where(total > info.tiny / info.eps, total, 1.0)


def entropy(distribution: Tensor) -> Tensor:
    """`-Σ p log p` over the last dimension; zeros add nothing and get no infinite gradient."""
    return -(distribution * distribution.clamp(min=torch.finfo(distribution.dtype).tiny).log()).sum(dim=-1)


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
    """Average `[L, B, S]` over the tokens of `mask` [B, S], to `[L]`; zero if no token counts."""
    return (values * mask).sum(dim=(1, 2)) / mask.sum().clamp(min=1)


def squared_variation(values: Tensor) -> Tensor:
    """Squared coefficient of variation over the last dimension, population variance; zero where all are zero."""
    mean = values.mean(dim=-1)
    variance = (values - mean.unsqueeze(-1)).square().mean(dim=-1)
    return variance / mean.square().clamp(min=torch.finfo(values.dtype).tiny)


def sample_tokens(mask: Tensor, max_tokens: int | None) -> Tensor | None:
    """Draw different token positions at random, real ones before padding, without waiting for the device.

    Args:
        mask: `[T]`, boolean or a number that is zero for padding.
        max_tokens: How many to draw; `None` for all.

    Returns:
        Positions `[max_tokens]`, or `None` if all tokens can stay. Padding is among them if fewer tokens are real, so
        the mask of what was drawn still counts.
    """
    if max_tokens is None or mask.shape[0] <= max_tokens:
        return None
    keys = torch.rand(mask.shape, device=mask.device).masked_fill(mask == 0, -1.0)
    return keys.topk(max_tokens).indices
