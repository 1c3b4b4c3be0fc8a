"""The best expert of a lower rank: singular values of `B A` from its factors, without the product itself."""

from __future__ import annotations

from collections.abc import Sequence
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
from molora.slim.statistics import ModuleStatistics

RIDGE = 1e-6
"""The least that a direction of the input counts, as a share of the mean: the data may lack it, but not all data."""


class Whitening(NamedTuple):
    """What is known of the inputs x of one module.

    Attributes:
        hidden: `E[A x (A x)ᵀ]` over the ranks of all its experts, `[R, R]`, fp64.
        least: What every direction of the input counts in addition, a share of the mean of `E[x xᵀ]`'s eigenvalues.
    """

    hidden: Tensor
    least: float

    def of(self, downs: Tensor, ranks: Tensor) -> Tensor:
        """The root L of the second moment `L Lᵀ` of what some rows of A make of the inputs, `[k, k]`.

        Args:
            downs: The rows, `[k, in]`.
            ranks: Their indices among all ranks of the module.
        """
        moment = self.hidden[ranks][:, ranks] + self.least * (downs @ downs.T).double()
        values, vectors = torch.linalg.eigh(moment)
        return vectors * values.clamp(min=0).sqrt()


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
        white, starts = whitening(None if usage is None else usage[module]), starts_of(own)
        experts[module] = [
            truncated(expert, rank, root_of(white, [expert], [start])) if expert.rank > rank else expert
            for expert, start in zip(own, starts, strict=True)
        ]
    new = rebuilt(adapter, experts)
    return Slimmed(new, "experts re-ranked", {"rank": rank, "whitened": _whitened(usage)}, compared(adapter, new))


def truncated(expert: Expert, rank: int, root: Tensor | None = None) -> Expert:
    """The best expert of a rank.

    Args:
        expert: The expert.
        rank: Of the result; not above the expert's own.
        root: L, `[r, r]`, where `L Lᵀ` is the second moment of what its A makes of the inputs: the output error is
            measured for those. `None` for white inputs.
    """
    up, down = expert.up.double(), expert.down.double()
    if root is None:
        left, values, right = product_svd(up, down)
        right = torch.where(values > 0, values, 1.0).unsqueeze(-1) * right
    else:  # the best product is the part of this one in the leading directions of its outputs
        basis, upper = torch.linalg.qr(up)
        inner, values, _ = torch.linalg.svd(upper @ root.to(up), full_matrices=False)
        left, right = basis @ inner, inner.T @ upper @ down
    left, values, right = left[:, :rank], values[:rank], right[:rank]
    # Half of each value to either side, but never two zeros, between which nothing could be learned.
    half = torch.where(values > 0, values.sqrt(), 1.0)
    missing = rank - len(values)
    new_up = pad(left * (values / half), (0, missing))
    new_down = pad(right / half.unsqueeze(-1), (0, 0, 0, missing))
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


def whitening(usage: ModuleStatistics | None) -> Whitening | None:
    """What statistics with second moments say about the inputs of a module; `None` if they say nothing."""
    if usage is None or usage.hidden is None or not usage.square:
        return None
    return Whitening(usage.hidden, RIDGE * usage.square)


def starts_of(experts: Sequence[Expert]) -> list[int]:
    """Where the ranks of each expert begin among those of its module."""
    return [sum(expert.rank for expert in experts[:index]) for index in range(len(experts))]


def root_of(white: Whitening | None, members: Sequence[Expert], starts: Sequence[int]) -> Tensor | None:
    """The root for `truncated` of some experts of a module side by side, `[k, k]`.

    Args:
        white: What is known of the module's inputs.
        members: The experts.
        starts: Where the ranks of each begin.
    """
    if white is None:
        return None
    ranks = [torch.arange(start, start + one.rank) for one, start in zip(members, starts, strict=True)]
    return white.of(torch.cat([one.down for one in members]).double(), torch.cat(ranks))


def _whitened(usage: Usage | None) -> bool:
    return usage is not None and any(one.hidden is not None for one in usage.values())


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
