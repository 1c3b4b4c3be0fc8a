"""The best expert of a lower rank: singular values of `B A` from its factors, without the product itself."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from molora.errors import ConfigError, Problem
from molora.slim.adapter import Adapter
from molora.slim.changes import Slimmed, compared
from molora.slim.experts import Expert, experts_of, rebuilt
from molora.slim.prune import Usage
from molora.slim.refusals import RERANK, check_slimming

RIDGE = 1e-6
"""The least that a direction of the input counts, as a share of the mean: the data may lack it, but not all data."""


class Whitening(NamedTuple):
    """Inputs `x = root · z` as linear images of white ones.

    Attributes:
        root: L with `L Lᵀ = E[x xᵀ]`, `[in, in]`.
        inverse: L⁻¹.
    """

    root: Tensor
    inverse: Tensor


def rerank(adapter: Adapter, rank: int, usage: Usage | None = None) -> Slimmed:
    """Give every expert its best approximation of at most a rank.

    Without statistics that is the nearest matrix. With second moments of the inputs it is the one whose output is
    nearest, for inputs as in the calibration data. Experts whose rank is not above stay as they are.

    Args:
        adapter: The adapter.
        rank: The rank that no expert is above afterwards.
        usage: Statistics with second moments, to weigh directions of the input by how common they are.

    Raises:
        ConfigError: If experts of this adapter are no products of their own, or the rank is none.
    """
    check_slimming(adapter.config, RERANK)
    if rank < 1:
        raise ConfigError([Problem("rank", f"got {rank!r}; must be at least 1.")], "cannot re-rank experts")
    experts = experts_of(adapter)
    for module, own in experts.items():
        white = None if usage is None else whitening(usage[module].moment)
        experts[module] = [truncated(expert, rank, white) if expert.rank > rank else expert for expert in own]
    new = rebuilt(adapter, experts)
    return Slimmed(new, "experts re-ranked", {"rank": rank, "whitened": usage is not None}, compared(adapter, new))


def truncated(expert: Expert, rank: int, white: Whitening | None = None) -> Expert:
    """The best expert of a rank.

    Args:
        expert: The expert.
        rank: Of the result; not above the expert's own.
        white: The output error is measured for such inputs; `None` for white ones.
    """
    up, down = expert.up.double(), expert.down.double()
    seen = down if white is None else down @ white.root.to(down)
    left, values, right = product_svd(up, seen)
    left, values, right = left[:, :rank], values[:rank], right[:rank]
    if white is not None:
        right = right @ white.inverse.to(right)
    # Half of each value to either side, but never two zeros, between which nothing could be learned.
    half = torch.where(values > 0, values.sqrt(), 1.0)
    missing = rank - len(values)
    new_up = pad(left * (values / half), (0, missing))
    new_down = pad(half.unsqueeze(-1) * right, (0, 0, 0, missing))
    return Expert(new_down.to(_wide(expert.down)), new_up.to(_wide(expert.up)), expert.scale)


def product_svd(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular value decomposition of `up · down`: `[out, k]`, `[k]`, `[k, in]`, with k at most the inner size.

    Args:
        up: `[out, R]`.
        down: `[R, in]`.
    """
    left, upper = torch.linalg.qr(up)
    right, lower = torch.linalg.qr(down.T)
    inner_left, values, inner_right = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    return left @ inner_left, values, inner_right @ right.T


def whitening(moment: Tensor | None) -> Whitening | None:
    """The root of a second moment `[in, in]`; `None` for none."""
    if moment is None:
        return None
    values, vectors = torch.linalg.eigh(moment.double())
    least = RIDGE * values.mean().clamp(min=torch.finfo(values.dtype).tiny)
    roots = values.clamp(min=least).sqrt()
    return Whitening(vectors * roots, (vectors / roots).T)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
