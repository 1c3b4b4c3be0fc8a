"""How experts share the matrices of a bank, chosen by name (`expert_layout` in the config)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from molora.experts import RankMap
from molora.fold import Factors, fold_factors, fold_pairs, fold_separate, fold_shared_a
from molora.kernels import factors, pairs, separate, shared_a
from molora.kernels.reference import Activation

ACTIVATIONS: dict[str, Activation] = {"gelu": F.gelu, "silu": F.silu, "relu": F.relu}


def _own_rows(ranks: tuple[int, ...], r: int | list[int]) -> tuple[int, tuple[int, ...]]:
    return sum(ranks), ranks


def _common_rows(ranks: tuple[int, ...], r: int | list[int]) -> tuple[int, tuple[int, ...]]:
    return ranks[0], ranks


def _crossed_rows(ranks: tuple[int, ...], r: int | list[int]) -> tuple[int, tuple[int, ...]]:
    assert isinstance(r, list | tuple)  # checked with the config: a pair of numbers
    rows, columns = r
    return rows, (columns,)


@dataclass(frozen=True)
class Layout:
    """One way to share the matrices of a bank.

    Attributes:
        gated: From the hidden to what B is multiplied with.
        folded: From A, B and weights that are fixed to the plain LoRA they are.
        sizes: From the ranks of the experts and `r` of the config to the rows of A, and the columns of B as blocks of
            those that belong together when it is drawn.
    """

    gated: Callable[[Tensor, Tensor | None, RankMap, Activation | None], Tensor]
    folded: Callable[[Tensor, Tensor, Tensor | None, RankMap], Factors]
    sizes: Callable[[tuple[int, ...], int | list[int]], tuple[int, tuple[int, ...]]] = _own_rows


LAYOUTS: dict[str, Layout] = {
    "separate": Layout(separate, fold_separate),
    "shared_A": Layout(shared_a, fold_shared_a, _common_rows),
    "pairs": Layout(pairs, fold_pairs, _crossed_rows),
    "factors": Layout(factors, fold_factors),
    "shards": Layout(separate, fold_separate),
}
"""`shards`: one expert whose vectors are put together from pools (MoS); nothing is mixed."""
