"""What the losses about directions share: unit vectors, and cosines of experts' outputs that no one ever computed."""

from __future__ import annotations

import torch
from torch import Tensor

from molora.losses.tokens import sample_tokens
from molora.routing.precision import full_precision, promote


def unit(vectors: Tensor) -> Tensor:
    """Scale the last dimension to length one, in fp32 at least. Zero stays zero and has a gradient of zero."""
    vectors = promote(vectors)
    return vectors * _inverse_root(vectors.square().sum(dim=-1, keepdim=True), 0.0)


def _inverse_root(squares: Tensor, floor: Tensor | float) -> Tensor:
    """`1 / sqrt` where above the floor, zero elsewhere, where its infinite gradient must not even be computed."""
    safe = squares > floor
    return torch.where(safe, torch.where(safe, squares, 1.0).rsqrt(), 0.0)


def membership(expert_of_column: Tensor, num_experts: int, like: Tensor) -> Tensor:
    """One row per expert that marks its columns, `[E, C]`; columns of experts beyond E, such as shared ones, in none.

    Args:
        expert_of_column: The expert of each column, `[C]`.
        num_experts: E.
        like: A tensor whose type and device the marks get.
    """
    experts = torch.arange(num_experts, device=like.device)
    return (expert_of_column.to(like.device) == experts.unsqueeze(-1)).to(like.dtype)


def output_cosines(z: Tensor, up: Tensor, member: Tensor) -> Tensor:
    """Cosines between the outputs of all pairs of experts, for every token, in the space of the ranks.

    With `e_i = B_i z_i`, `<e_i, e_j> = z_iᵀ (B_iᵀ B_j) z_j`: the Gram matrix of the columns of B, once per linear,
    holds all that the outputs say about each other. Memory is that of `[L, T, E, C]`; outputs would be
    `[L, T, E, out]`.

    Args:
        z: Hidden `A x`, `[L, T, C]` for C rank columns.
        up: B, `[L, out, C]`.
        member: Which columns belong to which expert, `[E, C]`.

    Returns:
        `[L, T, E, E]`. Where an output is zero up to rounding, as all are while B is zero, it is 0 without a gradient.
    """
    z, up = promote(z), promote(up)
    with full_precision(z):
        gram = up.mT @ up  # [L, C, C]
        own = z.unsqueeze(2) * member  # [L, T, E, C], each expert's part of z
        products = own.flatten(1, 2) @ gram
        products = products.reshape(own.shape) @ own.mT  # [L, T, E, E]
        # Cauchy-Schwarz: no rounding error of a squared norm is larger than this times the precision.
        lengths = (
            own.detach().abs() * gram.detach().diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()[:, None, None]
        ).sum(-1)
    floor = 8 * torch.finfo(products.dtype).eps * lengths.square()
    inverse = _inverse_root(products.diagonal(dim1=-2, dim2=-1), floor)  # [L, T, E]
    return products * inverse.unsqueeze(-1) * inverse.unsqueeze(-2)


def sampled_output_cosines(
    z: Tensor, up: Tensor, selected: Tensor, expert_of_column: Tensor, mask: Tensor | None, max_tokens: int | None
) -> tuple[Tensor, Tensor]:
    """`output_cosines` of a random sample of the tokens, the same for all linears, and what these selected.

    Args:
        z: `[L, T, C]`.
        up: `[L, out, C]`.
        selected: Boolean `[L, T, E]`.
        expert_of_column: `[C]`.
        mask: Boolean `[T]`, true for tokens that count; `None` for all.
        max_tokens: Size of the sample; `None` for all.

    Returns:
        The cosines `[L, T', E, E]`, and the experts selected `[L, T', E]`, boolean, none of them for padding.
    """
    real = selected.new_ones(z.shape[1]) if mask is None else mask.bool()
    drawn = sample_tokens(real, max_tokens)
    if drawn is not None:
        z, selected, real = z[:, drawn], selected[:, drawn], real[drawn]
    cosines = output_cosines(z, up, membership(expert_of_column, selected.shape[-1], promote(z)))
    return cosines, selected & real.unsqueeze(-1)


def mean_of_pairs(values: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean over all but the first dimension, `[L, ...]` to `[L]`; zero where nothing has weight."""
    return (values * weights).flatten(1).sum(dim=-1) / weights.flatten(1).sum(dim=-1).clamp(min=1)
