"""One read of x gives the hidden, the logits, and the mixing weights.

    h = x Aᵀ      z = x Wᵀ + bias      t = x vᵀ + bias      weights = route(z, t)

Layout: `x [T, IN]`, `a [R, IN]`, `router [E, IN]`, `threshold_row [1, IN]`, all row-major, so that tiles of A and of
the router are contiguous along the width that is summed over. Out: `h [T, R]` in x's dtype; `logits [T, E]`,
`threshold_logit [T, 1]` and `weights [T, ALL]` in fp32, of which those of shared experts are ones.

Decisions:
- A program owns a block of tokens and all experts, so it can decide about these tokens. Ranks in excess of BN go to
  further programs (axis 0, so that they run together and find x in the L2 cache); the first of them routes.
- A threshold's row is one more column of the router's tile.
- Logits are as exact as an fp32 product: an fp32 router meets 16-bit x as three 16-bit parts, each summed by itself.
  Near-ties between experts then fall as they do in fp32.
- Experts are ranked by repeated maxima, lowest index first among equals, and top-p adds up shares from the largest
  down, as a sort would. Nothing is sorted: E is small, and a sort spills.
- A NaN among the probabilities counts as selected, so it comes out in the weights instead of vanishing.
- A selected expert of weight zero gets `TINY`, so that `weights != 0` is the selection; the backward pass reads it.
"""

# mypy: disallow-untyped-defs=False
# The arguments of a jitted function are Triton's: pointers and tensors of blocks.
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from molora.kernels.choices import Choices
from molora.kernels.triton.common import (
    ADAPTIVE,
    INTERPRETED,
    check_equal_ranks,
    combine,
    dot,
    gate_values,
    mixing_weights,
    narrow,
    padded_experts,
    routing_constants,
    selected_experts,
    sigmoid,
    split,
)
from molora.kernels.triton.tiles import Tile, shrink_tile


@triton.jit
def _tokens(x_ptr, rows, k, T, IN):
    """Tile of x, `[BM, BK]`."""
    return tl.load(x_ptr + rows[:, None] * IN + k[None, :], mask=(rows < T)[:, None] & (k < IN)[None, :], other=0.0)


@triton.jit
def _ranks(a_ptr, columns, k, IN, R: tl.constexpr):
    """Rows of A as columns, `[BK, BN]`."""
    return tl.load(
        a_ptr + columns[None, :] * IN + k[:, None], mask=(k < IN)[:, None] & (columns < R)[None, :], other=0.0
    )


@triton.jit
def _store_hidden(h_ptr, acc, rows, columns, T, R: tl.constexpr, UP: tl.constexpr):
    tl.store(
        h_ptr + rows[:, None] * R + columns[None, :],
        narrow(acc, h_ptr.dtype.element_ty, UP),
        mask=(rows < T)[:, None] & (columns < R)[None, :],
    )


@triton.jit
def _router_tile(router_ptr, threshold_row_ptr, expert, k, IN, E: tl.constexpr):
    """Router rows as columns `[BK, EP]`, and the threshold's row as column E."""
    tile = tl.load(
        router_ptr + expert[None, :] * IN + k[:, None], mask=(k < IN)[:, None] & (expert < E)[None, :], other=0.0
    )
    if threshold_row_ptr is not None:
        column = tl.broadcast_to(k[:, None], tile.shape)
        row = tl.load(threshold_row_ptr + column, mask=(k < IN)[:, None] & (expert == E)[None, :], other=0.0)
        tile += row.to(tile.dtype)
    return tile


@triton.jit
def _route(
    z,
    router_bias_ptr,
    threshold_bias_ptr,
    balance_bias_ptr,
    logits_ptr,
    threshold_logit_ptr,
    weights_ptr,
    rows,
    T,
    temperature,
    top_p,
    threshold,
    max_threshold,
    E: tl.constexpr,
    ALL: tl.constexpr,
    SIGMOID: tl.constexpr,
    SELECTION: tl.constexpr,
    K: tl.constexpr,
    MINUS: tl.constexpr,
    RENORM: tl.constexpr,
):
    """Turn products with router rows `[BM, EP]` into logits and weights, and store them."""
    expert = tl.arange(0, z.shape[1])
    is_expert = tl.broadcast_to((expert < E)[None, :], z.shape)
    place = rows[:, None] * E + expert[None, :]
    mask = (rows < T)[:, None] & is_expert
    level = tl.full(z.shape, threshold, tl.float32)
    if SELECTION == ADAPTIVE:
        t = tl.sum(tl.where(expert[None, :] == E, z, 0.0), 1)
        if threshold_bias_ptr is not None:
            t += tl.load(threshold_bias_ptr).to(tl.float32)
        tl.store(threshold_logit_ptr + rows, t, mask=rows < T)
        level = tl.broadcast_to((max_threshold * sigmoid(t))[:, None], z.shape)
    if router_bias_ptr is not None:
        z += tl.load(router_bias_ptr + expert, mask=expert < E, other=0.0).to(tl.float32)[None, :]
    tl.store(logits_ptr + place, z, mask=mask)
    p = gate_values(z, is_expert, temperature, SIGMOID)
    keys = p
    if balance_bias_ptr is not None:
        keys += tl.load(balance_bias_ptr + expert, mask=expert < E, other=0.0).to(tl.float32)[None, :]
    keep = selected_experts(keys, is_expert, level, top_p, E, SELECTION, K)
    weights_ptr += rows * ALL
    tl.store(weights_ptr[:, None] + expert[None, :], mixing_weights(p, keep, level, MINUS, RENORM), mask=mask)
    for shared in tl.static_range(E, ALL):
        tl.store(weights_ptr + shared, tl.full(rows.shape, 1.0, tl.float32), mask=rows < T)


@triton.jit
def route_shrink(
    x_ptr,
    a_ptr,
    router_ptr,
    threshold_row_ptr,
    router_bias_ptr,
    threshold_bias_ptr,
    balance_bias_ptr,
    h_ptr,
    logits_ptr,
    threshold_logit_ptr,
    weights_ptr,
    T,
    IN,
    temperature,
    top_p,
    threshold,
    max_threshold,
    E: tl.constexpr,
    ALL: tl.constexpr,
    R: tl.constexpr,
    EP: tl.constexpr,
    SIGMOID: tl.constexpr,
    SELECTION: tl.constexpr,
    K: tl.constexpr,
    MINUS: tl.constexpr,
    RENORM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    UP: tl.constexpr,
):
    """Grid: (tiles of ranks, blocks of tokens). Pointers of biases and threshold may be `None`."""
    rows = tl.program_id(1).to(tl.int64) * BM + tl.arange(0, BM)
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    expert = tl.arange(0, EP)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    # A 16-bit router beside 16-bit x needs one product; one in fp32 three; fp32 x takes whatever there is as fp32.
    PARTS: tl.constexpr = (dtype != tl.float32) and (router_ptr.dtype.element_ty == tl.float32)
    if BN < R:  # noqa: SIM102  # a constant, unlike the next
        if tl.program_id(0) > 0:
            acc = tl.zeros((BM, BN), tl.float32)
            for start in range(0, IN, BK):
                k = start + tl.arange(0, BK)
                acc = dot(_tokens(x_ptr, rows, k, T, IN), _ranks(a_ptr, columns, k, IN, R), acc, UP)
            _store_hidden(h_ptr, acc, rows, columns, T, R, UP)
            return
    acc = tl.zeros((BM, BN), tl.float32)
    high = tl.zeros((BM, EP), tl.float32)
    middle = tl.zeros((BM, EP), tl.float32)
    low = tl.zeros((BM, EP), tl.float32)
    for start in range(0, IN, BK):
        k = start + tl.arange(0, BK)
        x = _tokens(x_ptr, rows, k, T, IN)
        acc = dot(x, _ranks(a_ptr, columns, k, IN, R), acc, UP)
        w = _router_tile(router_ptr, threshold_row_ptr, expert, k, IN, E)
        if PARTS:
            w_high, w_middle, w_low = split(w, dtype)
            high = dot(x, w_high, high, UP)
            middle = dot(x, w_middle, middle, UP)
            low = dot(x, w_low, low, UP)
        else:
            high = dot(x, w.to(dtype), high, UP)
    _store_hidden(h_ptr, acc, rows, columns, T, R, UP)
    z = high
    if PARTS:
        z = combine(high, middle, low, dtype)
    _route(
        z, router_bias_ptr, threshold_bias_ptr, balance_bias_ptr, logits_ptr, threshold_logit_ptr, weights_ptr, rows,
        T, temperature, top_p, threshold, max_threshold, E, ALL, SIGMOID, SELECTION, K, MINUS, RENORM,
    )  # fmt: skip


def shrink_constants(experts: int, ranks: int, choices: Choices, tile: Tile) -> dict[str, Any]:
    """What the kernel is compiled for.

    Args:
        experts: E.
        ranks: R.
        choices: Routing choices.
        tile: Block sizes.
    """
    return {
        "E": experts,
        "ALL": choices.bank(experts),
        "R": ranks,
        "EP": padded_experts(experts, choices),
        "K": min(choices.top_k, experts) if choices.selection == "top_k" else 0,
        "BM": tile.BM,
        "BN": tile.BN,
        "BK": tile.BK,
        "UP": INTERPRETED,
        **routing_constants(choices),
    }


def launch_route_shrink(
    x: Tensor,
    a: Tensor,
    router: Tensor,
    router_bias: Tensor | None,
    threshold_row: Tensor | None,
    threshold_bias: Tensor | None,
    balance_bias: Tensor | None,
    choices: Choices,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden `[T, R]`, logits `[T, E]`, threshold logit `[T, 1]` or empty, weights `[T, ALL]`. All contiguous.

    Args:
        x: `[T, in]`.
        a: `[R, in]`.
        router: `[E, in]`.
        router_bias: `[E]`.
        threshold_row: `[1, in]`.
        threshold_bias: `[1]`.
        balance_bias: `[E]`.
        choices: Routing choices.
    """
    tokens, width = x.shape
    experts, ranks = router.shape[0], a.shape[0]
    check_equal_ranks(a, router, choices)
    h = x.new_empty(tokens, ranks)
    logits = x.new_empty(tokens, experts, dtype=torch.float32)
    weights = logits.new_empty(tokens, choices.bank(experts))
    threshold_logit = logits.new_empty((tokens, 1) if choices.adaptive else (0,))
    tile = shrink_tile(x.device, x.dtype, tokens, experts, ranks, padded_experts(experts, choices))
    route_shrink[triton.cdiv(ranks, tile.BN), triton.cdiv(tokens, tile.BM)](
        x, a, router, threshold_row, router_bias, threshold_bias, balance_bias, h, logits, threshold_logit, weights,
        tokens, width, choices.temperature, choices.top_p, choices.threshold, choices.max_threshold,
        **shrink_constants(experts, ranks, choices, tile), **tile.options,
    )  # fmt: skip
    return h, logits, threshold_logit, weights
