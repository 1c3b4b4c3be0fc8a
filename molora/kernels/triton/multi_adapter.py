"""Many adapters in one batch, two launches whatever their number. Inference only; see `molora.kernels.multi_adapter`.

    h[row] = x[row] A_aᵀ      weights[row] = route_a(x[row])      y[row] += scale_a · (weights[row] ⊙ h[row]) B_aᵀ

with a = index[row], the adapter of a row, -1 for none.

Decisions:
- An axis of the grid is the row, so a block of tokens never straddles two adapters; nothing is sorted or gathered.
  Within its row a program does what the kernels of one adapter do: it calls them, shifted to the row.
- The matrices of the adapters stay where they are: `pointers`.
- A row without an adapter ends at once; its part of y is not even read.
- Rows of few tokens, as when decoding, would leave most of a device idle and have kernels of their own: `few_tokens`.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from molora.errors import MoloraError
from molora.kernels.choices import Choices
from molora.kernels.triton import _device_of, few_tokens
from molora.kernels.triton.common import ADAPTIVE, check_equal_ranks, padded_experts
from molora.kernels.triton.expand_add import expand_add, expand_constants
from molora.kernels.triton.pointers import (
    MATRIX_A,
    MATRIX_B,
    ROUTER,
    ROUTER_BIAS,
    THRESHOLD_BIAS,
    THRESHOLD_ROW,
    Table,
    column,
    indices,
    pointer,
    routed_constants,
    table,
)
from molora.kernels.triton.route_shrink import route_shrink, shrink_constants
from molora.kernels.triton.tiles import FEW_TOKENS, expand_tile, shrink_tile

if TYPE_CHECKING:
    from molora.kernels.adapter_parts import AdapterParts


@triton.jit
def rows_route_shrink(
    x_ptr,
    index_ptr,
    table_ptr,
    h_ptr,
    logits_ptr,
    threshold_logit_ptr,
    weights_ptr,
    S,
    IN,
    adapters,
    temperature,
    top_p,
    threshold,
    max_threshold,
    ROUTED_BY: tl.constexpr,
    HAS_ROUTER_BIAS: tl.constexpr,
    HAS_THRESHOLD_BIAS: tl.constexpr,
    ALIGNED: tl.constexpr,
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
    """Grid: (tiles of ranks, blocks of tokens, rows). ROUTED_BY is the dtype of router and threshold net."""
    row = tl.program_id(2).to(tl.int64)
    adapter = tl.load(index_ptr + row)
    if adapter < 0:
        return
    a_ptr = pointer(table_ptr, MATRIX_A, adapters, adapter, x_ptr.dtype.element_ty, ALIGNED)
    router_ptr = pointer(table_ptr, ROUTER, adapters, adapter, ROUTED_BY, ALIGNED)
    router_bias_ptr = None
    if HAS_ROUTER_BIAS:
        router_bias_ptr = pointer(table_ptr, ROUTER_BIAS, adapters, adapter, ROUTED_BY, False)
    threshold_row_ptr = None
    if SELECTION == ADAPTIVE:
        threshold_row_ptr = pointer(table_ptr, THRESHOLD_ROW, adapters, adapter, ROUTED_BY, ALIGNED)
    threshold_bias_ptr = None
    if HAS_THRESHOLD_BIAS:
        threshold_bias_ptr = pointer(table_ptr, THRESHOLD_BIAS, adapters, adapter, ROUTED_BY, False)
    token = row * S
    route_shrink(
        x_ptr + token * IN, a_ptr, router_ptr, threshold_row_ptr, router_bias_ptr, threshold_bias_ptr, None,
        h_ptr + token * R, logits_ptr + token * E, threshold_logit_ptr + token, weights_ptr + token * ALL, S, IN,
        temperature, top_p, threshold, max_threshold, E, ALL, R, EP, SIGMOID, SELECTION, K, MINUS, RENORM, BM, BN, BK,
        UP,
    )  # fmt: skip


@triton.jit
def rows_expand_add(
    y_ptr,
    index_ptr,
    table_ptr,
    scales_ptr,
    h_ptr,
    weights_ptr,
    S,
    OUT,
    adapters,
    ALIGNED: tl.constexpr,
    ALL: tl.constexpr,
    R: tl.constexpr,
    RANK: tl.constexpr,
    SKIP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    UP: tl.constexpr,
):
    """Grid: (tiles of the width, blocks of tokens, rows)."""
    row = tl.program_id(2).to(tl.int64)
    adapter = tl.load(index_ptr + row)
    if adapter < 0:
        return
    b_ptr = pointer(table_ptr, MATRIX_B, adapters, adapter, y_ptr.dtype.element_ty, ALIGNED)
    scale = tl.load(scales_ptr + adapter)
    token = row * S
    y_ptr += token * OUT
    expand_add(
        y_ptr,
        y_ptr,
        h_ptr + token * R,
        weights_ptr + token * ALL,
        b_ptr,
        S,
        OUT,
        scale,
        ALL,
        R,
        RANK,
        SKIP,
        BM,
        BN,
        BK,
        UP,
    )


def _check(x: Tensor, y: Tensor, adapters: Sequence[AdapterParts], choices: Choices) -> None:
    """Refuse adapters that one launch cannot serve.

    Raises:
        MoloraError: If dtypes differ, only some have a bias, or a matrix is not contiguous.
    """
    first, kinds = adapters[0], set()
    check_equal_ranks(first.a, first.router, choices)
    for one in adapters:
        level = (one.threshold_row, one.threshold_bias) if choices.adaptive else ()
        parts = (one.router, one.router_bias, *level)
        kinds.add((one.a.dtype, one.b.dtype, *(None if part is None else part.dtype for part in parts)))
        if not all(part is None or part.is_contiguous() for part in (one.a, one.b, *parts)):
            raise MoloraError("Kernels for mixed rows need contiguous matrices; call `contiguous()` on each of them.")
    routed = {dtype for kind in kinds for dtype in kind[2:] if dtype is not None}
    if len(kinds) > 1 or len(routed) > 1 or not {first.a.dtype, first.b.dtype, y.dtype} == {x.dtype}:
        raise MoloraError(
            f"Kernels for mixed rows need A and B in the dtype of x and y ({x.dtype}, {y.dtype}), one dtype of all "
            "that routes, and a router bias of all adapters or of none; got (A, B, router, its bias, threshold net, "
            f'its bias) of {sorted(map(str, kinds))}. Cast them, or use `backend="torch"`.'
        )


def mixed_rows_triton(
    x: Tensor, y: Tensor, index: Sequence[int], adapters: Sequence[AdapterParts], choices: Choices
) -> Tensor:
    """Add to each row of `y` what its adapter makes of that row of `x`; see `molora.kernels.multi_adapter.mixed_rows`.

    Args:
        x: `[N, S, in]`.
        y: `[N, S, out]`, changed in place.
        index: For each row the place of its adapter, -1 for none.
        adapters: All with the same shapes and dtypes.
        choices: The routing choices of them all.
    """
    if not y.is_contiguous():
        return y.copy_(mixed_rows_triton(x, y.contiguous(), index, adapters, choices))
    if not y.numel() or max(index) < 0:
        return y
    _check(x, y, adapters, choices)
    with _device_of(x):
        columns = tuple(column(one, choices.adaptive) for one in adapters)
        known = table(columns, tuple(float(one.scale) for one in adapters), x.device)
        run = few_tokens.launch if x.shape[1] <= few_tokens.MOST_TOKENS else launch
        run(x.contiguous(), y, indices(tuple(index), x.device), known, adapters[0], choices)
    return y


def launch(x: Tensor, y: Tensor, index: Tensor, known: Table, one: AdapterParts, choices: Choices) -> None:
    """Rows of many tokens; see `mixed_rows_triton`.

    Args:
        x: `[N, S, in]`.
        y: `[N, S, out]`.
        index: `[N]`.
        known: The adapters.
        one: Any of them, which stands for the shapes and dtypes of all.
        choices: Their routing choices.
    """
    (rows, tokens, width), out, adapters = x.shape, y.shape[2], known.scales.numel()
    experts, ranks = one.router.shape[0], one.a.shape[0]
    bank = choices.bank(experts)
    h = x.new_empty(rows * tokens, ranks)
    logits = x.new_empty(rows * tokens, experts, dtype=torch.float32)
    weights, level = logits.new_empty(rows * tokens, bank), logits.new_empty(rows * tokens if choices.adaptive else 1)
    tile = shrink_tile(x.device, x.dtype, tokens, experts, ranks, padded_experts(experts, choices))
    rows_route_shrink[triton.cdiv(ranks, tile.BN), triton.cdiv(tokens, tile.BM), rows](
        x, index, known.addresses, h, logits, level, weights, tokens, width, adapters, choices.temperature,
        choices.top_p, choices.threshold, choices.max_threshold, **routed_constants(one, choices, known.aligned),
        **shrink_constants(experts, ranks, choices, tile), **tile.options,
    )  # fmt: skip
    tile = expand_tile(x.device, x.dtype, tokens, ranks)
    rows_expand_add[triton.cdiv(out, tile.BN), triton.cdiv(tokens, tile.BM), rows](
        y, index, known.addresses, known.scales, h, weights, tokens, out, adapters, ALIGNED=known.aligned,
        **expand_constants(bank, ranks, tokens <= FEW_TOKENS, tile), **tile.options,
    )  # fmt: skip
