"""How experts share the matrices of a bank, chosen by name (`expert_layout` in the config)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from molora.experts import RankMap
from molora.kernels import factors, pairs, separate, shared_a
from molora.kernels.reference import Activation

ACTIVATIONS: dict[str, Activation] = {"gelu": F.gelu, "silu": F.silu, "relu": F.relu}


@dataclass(frozen=True)
class Layout:
    """One way to share the matrices of a bank.

    Attributes:
        gated: From the hidden to what B is multiplied with.
        rows: Rows of A, given the ranks of the experts and `r` of the config.
        columns: Columns of B, likewise.
        blocks: Columns of B that belong together when it is drawn.
    """

    gated: Callable[[Tensor, Tensor | None, RankMap, Activation | None], Tensor]
    rows: Callable[[tuple[int, ...], int | list[int]], int] = lambda ranks, r: sum(ranks)
    columns: Callable[[tuple[int, ...], int | list[int]], int] = lambda ranks, r: sum(ranks)
    blocks: Callable[[tuple[int, ...], int | list[int]], tuple[int, ...]] = lambda ranks, r: ranks


LAYOUTS: dict[str, Layout] = {
    "separate": Layout(separate),
    "shared_A": Layout(shared_a, rows=lambda ranks, r: ranks[0]),
    "pairs": Layout(
        pairs,
        rows=lambda ranks, r: r[0],  # type: ignore[index]  # checked: a pair of numbers
        columns=lambda ranks, r: r[1],  # type: ignore[index]
        blocks=lambda ranks, r: (r[1],),  # type: ignore[index]
    ),
    "factors": Layout(factors),
    "shards": Layout(separate),
}
"""`shards`: one expert whose vectors are put together from pools (MoS); nothing is mixed."""
