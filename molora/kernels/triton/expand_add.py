"""Adds the gated hidden times B to y, in one pass over y.

    y' = y + (scale · repeat(w, RANK) ⊙ h) Bᵀ

Layout: `y [T, OUT]`, `h [T, R]`, `weights [T, ALL]` in fp32, `b [OUT, R]` row-major, so that tiles of B are contiguous
along the ranks that are summed over. `out` may be y itself.

Decisions:
- The product of gate and hidden is rounded to x's dtype before the dot, as a chain of torch operations would; the sum
  is in fp32 and meets y there, so y' is rounded once.
- Ranks come in chunks of BK. With `SKIP`, a chunk none of whose experts has a weight in the block of tokens is not
  read. That pays where blocks hold few tokens, or where there are many chunks; else the test only stops the pipeline.
- y is read first and added last: its latency hides behind the dots, and small terms are summed before they meet it.
- No backward pass of its own: `hidden_backward` and `weight_gradient` are it.
"""

# mypy: disallow-untyped-defs=False
# The arguments of a jitted function are Triton's: pointers and tensors of blocks.
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from molora.kernels.triton.common import INTERPRETED, dot, narrow
from molora.kernels.triton.tiles import FEW_TOKENS, WHOLE_RANKS, Tile, expand_tile


@triton.jit
def _gates(weights_ptr, rows, columns, T, scale, ALL: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr):
    """Weight of each rank's expert times the scale, `[BM, BK]`."""
    return scale * tl.load(
        weights_ptr + rows[:, None] * ALL + (columns // RANK)[None, :],
        mask=(rows < T)[:, None] & (columns < R)[None, :],
        other=0.0,
    )


@triton.jit
def _chunk(h_ptr, b_ptr, gates, acc, rows, columns, wide, T, OUT, R: tl.constexpr, UP: tl.constexpr):
    """Add the product of one chunk of ranks."""
    h = tl.load(
        h_ptr + rows[:, None] * R + columns[None, :], mask=(rows < T)[:, None] & (columns < R)[None, :], other=0.0
    )
    b = tl.load(
        b_ptr + wide[None, :].to(tl.int64) * R + columns[:, None],
        mask=(columns < R)[:, None] & (wide < OUT)[None, :],
        other=0.0,
    )
    return dot(narrow(h.to(tl.float32) * gates, b_ptr.dtype.element_ty, UP), b, acc, UP)


@triton.jit
def expand_add(
    y_ptr,
    out_ptr,
    h_ptr,
    weights_ptr,
    b_ptr,
    T,
    OUT,
    scale,
    ALL: tl.constexpr,
    R: tl.constexpr,
    RANK: tl.constexpr,
    SKIP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    UP: tl.constexpr,
):
    """Grid: (tiles of the width, blocks of tokens)."""
    rows = tl.program_id(1).to(tl.int64) * BM + tl.arange(0, BM)
    wide = tl.program_id(0) * BN + tl.arange(0, BN)
    mask = (rows < T)[:, None] & (wide < OUT)[None, :]
    place = rows[:, None] * OUT + wide[None, :]
    y = tl.load(y_ptr + place, mask=mask, other=0.0)
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, R, BK):
        columns = start + tl.arange(0, BK)
        gates = _gates(weights_ptr, rows, columns, T, scale, ALL, R, RANK)
        if SKIP:
            # Not `> 0`: weights may be negative, and NaN must come through.
            if tl.max((gates != 0.0).to(tl.int32)) > 0:
                acc = _chunk(h_ptr, b_ptr, gates, acc, rows, columns, wide, T, OUT, R, UP)
        else:
            acc = _chunk(h_ptr, b_ptr, gates, acc, rows, columns, wide, T, OUT, R, UP)
    tl.store(out_ptr + place, narrow(y.to(tl.float32) + acc, out_ptr.dtype.element_ty, UP), mask=mask)


def expand_constants(experts: int, ranks: int, few: bool, tile: Tile) -> dict[str, Any]:
    """What the kernel is compiled for.

    Args:
        experts: ALL.
        ranks: R.
        few: Whether there are at most `FEW_TOKENS` tokens.
        tile: Block sizes.
    """
    return {
        "ALL": experts,
        "R": ranks,
        "RANK": ranks // experts,
        "SKIP": few or ranks > WHOLE_RANKS,
        "BM": tile.BM,
        "BN": tile.BN,
        "BK": tile.BK,
        "UP": INTERPRETED,
    }


def launch_expand_add(y: Tensor, out: Tensor, h: Tensor, weights: Tensor, b: Tensor, scale: float) -> None:
    """Write `y + (scale · gate ⊙ h) bᵀ` into `out`. All contiguous.

    Args:
        y: `[T, out]`.
        out: `[T, out]`; may be y.
        h: `[T, R]`.
        weights: `[T, ALL]`.
        b: `[out, R]`.
        scale: Factor of every expert.
    """
    tokens, width = y.shape
    experts, ranks = weights.shape[1], h.shape[1]
    tile = expand_tile(y.device, torch.promote_types(y.dtype, h.dtype), tokens, ranks)
    expand_add[triton.cdiv(width, tile.BN), triton.cdiv(tokens, tile.BM)](
        y, out, h, weights, b, tokens, width, scale, **expand_constants(experts, ranks, tokens <= FEW_TOKENS, tile),
        **tile.options,
    )  # fmt: skip
