"""Gradients of A and the router in one pass over x, and of B in one over the gradient of y'.

    dA = dhᵀ x      [dW; dv] = [dz | dt]ᵀ x      dB = gyᵀ (scale · repeat(w, RANK) ⊙ h)

Layout: `small [T, STRIDE]`, whose first M columns count (dh, or h with its weights), and `wide [T, N]` (x, or gy)
share a dtype; `exact [T, X]` is fp32. Out: fp32 `parts [slices, M + X, N]`, or `[slices, N, M]` if `TRANSPOSED`, as
B is.

Decisions:
- Tokens are cut into slices, so that enough programs run; each leaves fp32 sums, and `torch.sum` adds the slices, in
  the same order every time. No atomics: two runs give the same bits.
- The gated hidden of dB is made anew from h and the weights, and rounded as the forward pass rounded it.
- An fp32 `exact` meets 16-bit x as three 16-bit parts, as in `route_shrink`, so the router's gradient is as exact as
  an fp32 product.
"""

# mypy: disallow-untyped-defs=False
# The arguments of a jitted function are Triton's: pointers and tensors of blocks.
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from molora.kernels.triton.common import INTERPRETED, combine, dot, narrow, slices_of, split
from molora.kernels.triton.tiles import Tile, gradient_tile, padded, processors


@triton.jit
def weight_gradient(
    small_ptr,
    weights_ptr,
    exact_ptr,
    wide_ptr,
    parts_ptr,
    T,
    N,
    per_slice,
    scale,
    ALL: tl.constexpr,
    RANK: tl.constexpr,
    M: tl.constexpr,
    STRIDE: tl.constexpr,
    X: tl.constexpr,
    XP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    UP: tl.constexpr,
):
    """Grid: (blocks of ranks, and one more for `exact` if given; tiles of the width; slices of tokens)."""
    dtype: tl.constexpr = wide_ptr.dtype.element_ty
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    begin = tl.program_id(2).to(tl.int64) * per_slice
    end = tl.minimum(begin + per_slice, T)
    rounds = tl.cdiv(end - begin, BK).to(tl.int32)
    parts_ptr += tl.program_id(2).to(tl.int64) * (M + X) * N
    if exact_ptr is not None:  # noqa: SIM102  # a constant, unlike the next
        if tl.program_id(0) == tl.num_programs(0) - 1:
            high = tl.zeros((XP, BN), tl.float32)
            middle = tl.zeros((XP, BN), tl.float32)
            low = tl.zeros((XP, BN), tl.float32)
            x_rows = tl.arange(0, XP)
            for step in range(rounds):
                tokens = begin + step * BK + tl.arange(0, BK)
                wide = tl.load(
                    wide_ptr + tokens[:, None] * N + columns[None, :],
                    mask=(tokens < end)[:, None] & (columns < N)[None, :],
                    other=0.0,
                )
                exact = tl.load(
                    exact_ptr + tokens[None, :] * X + x_rows[:, None],
                    mask=(tokens < end)[None, :] & (x_rows < X)[:, None],
                    other=0.0,
                )
                if dtype == tl.float32:
                    high = dot(exact, wide, high, UP)
                else:
                    e_high, e_middle, e_low = split(exact, dtype)
                    high = dot(e_high, wide, high, UP)
                    middle = dot(e_middle, wide, middle, UP)
                    low = dot(e_low, wide, low, UP)
            if dtype != tl.float32:
                high = combine(high, middle, low, dtype)
            tl.store(
                parts_ptr + (M + x_rows)[:, None].to(tl.int64) * N + columns[None, :],
                high,
                mask=(x_rows < X)[:, None] & (columns < N)[None, :],
            )
            return
    ranks = tl.program_id(0) * BM + tl.arange(0, BM)
    acc = tl.zeros((BM, BN), tl.float32)
    for step in range(rounds):
        tokens = begin + step * BK + tl.arange(0, BK)
        wide = tl.load(
            wide_ptr + tokens[:, None] * N + columns[None, :],
            mask=(tokens < end)[:, None] & (columns < N)[None, :],
            other=0.0,
        )
        mask = (tokens < end)[None, :] & (ranks < M)[:, None]
        small = tl.load(small_ptr + tokens[None, :] * STRIDE + ranks[:, None], mask=mask, other=0.0)
        if weights_ptr is not None:
            gates = tl.load(weights_ptr + tokens[None, :] * ALL + (ranks // RANK)[:, None], mask=mask, other=0.0)
            small = narrow(small.to(tl.float32) * (scale * gates), dtype, UP)
        acc = dot(small, wide, acc, UP)
    mask = (ranks < M)[:, None] & (columns < N)[None, :]
    if TRANSPOSED:
        tl.store(parts_ptr + columns[None, :].to(tl.int64) * M + ranks[:, None], acc, mask=mask)
    else:
        tl.store(parts_ptr + ranks[:, None].to(tl.int64) * N + columns[None, :], acc, mask=mask)


def gradient_constants(
    ranks: int, experts: int, stride: int, exact: int, transposed: bool, tile: Tile
) -> dict[str, Any]:
    """What the kernel is compiled for.

    Args:
        ranks: M.
        experts: ALL.
        stride: Columns of `small`.
        exact: X, or zero if there is none.
        transposed: Whether the parts are laid out as B is.
        tile: Block sizes.
    """
    return {
        "ALL": experts,
        "RANK": ranks // experts,
        "M": ranks,
        "STRIDE": stride,
        "X": exact,
        "XP": padded(exact) if exact else 16,
        "TRANSPOSED": transposed,
        "BM": tile.BM,
        "BN": tile.BN,
        "BK": tile.BK,
        "UP": INTERPRETED,
    }


def _launch(
    small: Tensor, wide: Tensor, ranks: int, experts: int, weights: Tensor | None, exact: Tensor | None, scale: float
) -> Tensor:
    """The sum over all slices: fp32 `[M + X, N]`, or `[N, M]` if weights are given."""
    tokens, width = wide.shape
    extra = 0 if exact is None else exact.shape[1]
    tile = gradient_tile(wide.device, wide.dtype, ranks, extra)
    grid = (triton.cdiv(ranks, tile.BM) + (exact is not None), triton.cdiv(width, tile.BN))
    slices, per_slice = slices_of(tokens, tile.BK, grid[0] * grid[1], 2 * processors(wide.device))
    shape = (width, ranks) if weights is not None else (ranks + extra, width)
    parts = torch.empty(slices, *shape, dtype=torch.float32, device=wide.device)
    weight_gradient[(*grid, slices)](
        small, weights, exact, wide, parts, tokens, width, per_slice, scale,
        **gradient_constants(ranks, experts, small.shape[1], extra, weights is not None, tile), **tile.options,
    )  # fmt: skip
    return parts[0] if slices == 1 else parts.sum(dim=0)


def launch_down_gradient(packed: Tensor, exact: Tensor | None, x: Tensor, ranks: int, experts: int) -> Tensor:
    """`[dA; dW; dv]` in fp32, `[R + X, in]`; without `exact` only dA.

    Args:
        packed: `[T, WIDTH]`, whose first R columns are dh.
        exact: `[T, X]`, gradients of logits and threshold logit.
        x: `[T, in]`.
        ranks: R.
        experts: ALL.
    """
    return _launch(packed, x, ranks, experts, None, exact, 1.0)


def launch_up_gradient(h: Tensor, weights: Tensor, gy: Tensor, scale: float) -> Tensor:
    """DB in fp32, `[out, R]`.

    Args:
        h: `[T, R]`.
        weights: `[T, ALL]`.
        gy: `[T, out]`.
        scale: Factor of every expert.
    """
    return _launch(h, gy, h.shape[1], weights.shape[1], weights, None, scale)
