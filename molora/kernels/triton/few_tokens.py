"""Rows of few tokens, as when decoding: sums over the input width are cut into slices, so that every processor works.

A row of one token has one block of tokens. With whole sums it would keep one or two processors busy, each waiting for
memory `in / BK` times in turn; what counts is how many read at once. So

    part[s] = x[:, slice s] ([A_a; router_a; threshold_a][:, slice s])ᵀ        rows × slices × tiles of ranks
    h, z = Σ_s part[s]      y += scale_a · (route(z) ⊙ h) B_aᵀ                 rows × tiles of the output

Decisions:
- Parts are fp32 and summed in the order of the slices by whoever needs them, so results do not vary from run to run.
- Every program of the second launch routes for itself. That is some arithmetic on `[16, EP]`, less than a launch.
- The gate goes from experts to ranks by a gather within the program. A product with a 0/1 matrix spills registers.
- Up to `MOST_RANKS` ranks B is read before the parts arrive, dead experts and all, as waiting costs more than
  reading; with more ranks, chunks of experts without weight are skipped.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from molora.kernels.choices import Choices
from molora.kernels.triton.common import (
    ADAPTIVE,
    INTERPRETED,
    combine,
    dot,
    gate_values,
    narrow,
    padded_experts,
    routing_constants,
    sigmoid,
    split,
)
from molora.kernels.triton.pointers import (
    MATRIX_A,
    MATRIX_B,
    ROUTER,
    ROUTER_BIAS,
    THRESHOLD_BIAS,
    THRESHOLD_ROW,
    Table,
    pointer,
    routed_constants,
)
from molora.kernels.triton.route_shrink import _router_tile, mixing_weights, selected_experts
from molora.kernels.triton.tiles import device_class, padded, processors

if TYPE_CHECKING:
    from molora.kernels.adapter_parts import AdapterParts

MOST_TOKENS = 16
"""Tokens of one block, the fewest that a dot takes: rows of so many have this form."""

MOST_RANKS = 64
"""Up to so many ranks the second kernel takes them all at once; with 128 it spills registers."""


@triton.jit
def rows_partial(
    x_ptr,
    index_ptr,
    table_ptr,
    parts_ptr,
    S,
    IN,
    per_slice,
    adapters,
    ROUTED_BY: tl.constexpr,
    ALIGNED: tl.constexpr,
    SELECTION: tl.constexpr,
    E: tl.constexpr,
    R: tl.constexpr,
    EP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    UP: tl.constexpr,
):
    """Fill `parts [N, slices, S, R + EP]`. Grid: (tiles of ranks and one more for the router, slices, rows)."""
    row = tl.program_id(2).to(tl.int64)
    adapter = tl.load(index_ptr + row)
    if adapter < 0:
        return
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    begin = tl.program_id(1) * per_slice
    end = tl.minimum(begin + per_slice, IN)
    token = tl.arange(0, BM)
    x_ptr += row * S * IN + token[:, None] * IN
    place = ((row * tl.num_programs(1) + tl.program_id(1)) * S + token)[:, None] * (R + EP)
    here = (token < S)[:, None]
    if tl.program_id(0) < tl.num_programs(0) - 1:
        a_ptr = pointer(table_ptr, MATRIX_A, adapters, adapter, DTYPE, ALIGNED)
        column = tl.program_id(0) * BN + tl.arange(0, BN)
        acc = tl.zeros((BM, BN), tl.float32)
        for start in range(begin, end, BK):
            k = start + tl.arange(0, BK)
            x = tl.load(x_ptr + k[None, :], mask=here & (k < IN)[None, :], other=0.0)
            a = tl.load(
                a_ptr + column[None, :] * IN + k[:, None], mask=(k < IN)[:, None] & (column < R)[None, :], other=0.0
            )
            acc = dot(x, a, acc, UP)
        tl.store(parts_ptr + place + column[None, :], acc, mask=here & (column < R)[None, :])
    else:
        router_ptr = pointer(table_ptr, ROUTER, adapters, adapter, ROUTED_BY, ALIGNED)
        threshold_row_ptr = None
        if SELECTION == ADAPTIVE:
            threshold_row_ptr = pointer(table_ptr, THRESHOLD_ROW, adapters, adapter, ROUTED_BY, ALIGNED)
        PARTS: tl.constexpr = router_ptr.dtype.element_ty != DTYPE and DTYPE != tl.float32  # noqa: SIM300
        expert = tl.arange(0, EP)
        high = tl.zeros((BM, EP), tl.float32)
        middle = tl.zeros((BM, EP), tl.float32)
        low = tl.zeros((BM, EP), tl.float32)
        for start in range(begin, end, BK):
            k = start + tl.arange(0, BK)
            x = tl.load(x_ptr + k[None, :], mask=here & (k < IN)[None, :], other=0.0)
            w = _router_tile(router_ptr, threshold_row_ptr, expert, k, IN, E)
            if PARTS:
                w_high, w_middle, w_low = split(w, DTYPE)
                high = dot(x, w_high, high, UP)
                middle = dot(x, w_middle, middle, UP)
                low = dot(x, w_low, low, UP)
            else:
                high = dot(x, w.to(DTYPE), high, UP)
        z = combine(high, middle, low, DTYPE) if PARTS else high
        tl.store(parts_ptr + place + R + expert[None, :], z, mask=here)


@triton.jit
def _summed(parts_ptr, place, mask, stride, SLICES: tl.constexpr):
    """The sum over the slices, in their order."""
    total = tl.load(parts_ptr + place, mask=mask, other=0.0)
    for number in tl.static_range(1, SLICES):
        total += tl.load(parts_ptr + number * stride + place, mask=mask, other=0.0)
    return total


@triton.jit
def rows_route_expand(
    y_ptr,
    index_ptr,
    table_ptr,
    scales_ptr,
    parts_ptr,
    S,
    OUT,
    adapters,
    temperature,
    top_p,
    threshold,
    max_threshold,
    ROUTED_BY: tl.constexpr,
    HAS_ROUTER_BIAS: tl.constexpr,
    HAS_THRESHOLD_BIAS: tl.constexpr,
    ALIGNED: tl.constexpr,
    SLICES: tl.constexpr,
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
    """Sum the parts, route, and add to y. Grid: (tiles of the width, rows)."""
    row = tl.program_id(1).to(tl.int64)
    adapter = tl.load(index_ptr + row)
    if adapter < 0:
        return
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    b_ptr = pointer(table_ptr, MATRIX_B, adapters, adapter, DTYPE, ALIGNED)
    scale = tl.load(scales_ptr + adapter)
    token, expert = tl.arange(0, BM), tl.arange(0, EP)
    wide = tl.program_id(0) * BN + tl.arange(0, BN)
    here = (token < S)[:, None]
    mask = here & (wide < OUT)[None, :]
    y_ptr += (row * S + token)[:, None] * OUT + wide[None, :]
    y = tl.load(y_ptr, mask=mask, other=0.0)
    b_ptr += wide[None, :].to(tl.int64) * R
    column = tl.arange(0, BK)
    WHOLE: tl.constexpr = BK >= R
    if WHOLE:
        early = tl.load(b_ptr + column[:, None], mask=(column < R)[:, None] & (wide < OUT)[None, :], other=0.0)

    place = (row * SLICES * S + token)[:, None] * (R + EP)
    stride = S * (R + EP)
    z = _summed(parts_ptr, place + R + expert[None, :], here, stride, SLICES)
    is_expert = tl.broadcast_to((expert < E)[None, :], z.shape)
    level = tl.full(z.shape, threshold, tl.float32)
    if SELECTION == ADAPTIVE:
        t = tl.sum(tl.where(expert[None, :] == E, z, 0.0), 1)
        if HAS_THRESHOLD_BIAS:
            t += tl.load(pointer(table_ptr, THRESHOLD_BIAS, adapters, adapter, ROUTED_BY, False)).to(tl.float32)
        level = tl.broadcast_to((max_threshold * sigmoid(t))[:, None], z.shape)
    if HAS_ROUTER_BIAS:
        bias_ptr = pointer(table_ptr, ROUTER_BIAS, adapters, adapter, ROUTED_BY, False)
        z += tl.load(bias_ptr + expert, mask=expert < E, other=0.0).to(tl.float32)[None, :]
    p = gate_values(z, is_expert, temperature, SIGMOID)
    keep = selected_experts(p, is_expert, level, top_p, E, SELECTION, K)
    weights = mixing_weights(p, keep, level, MINUS, RENORM) * scale
    if ALL > E:
        weights = tl.where(is_expert, weights, scale)  # EP > E, so that shared experts find theirs in the padding

    acc = tl.zeros((BM, BN), tl.float32)
    for first in range(0, R, BK):
        columns = first + column
        # Shared experts and padding take the gate of the last column; the hidden of padding is zero.
        RANK: tl.constexpr = R // ALL
        # A division by multiplication, exact below 2**20 / RANK: AMD's compiler of Triton 3.9 dies of one by 3.
        of = (columns * ((1 << 20) // RANK + 1)) >> 20 if RANK & (RANK - 1) else columns // RANK
        gates = tl.gather(weights, tl.broadcast_to(tl.minimum(of, EP - 1)[None, :], (BM, BK)), 1)
        there = columns < R
        if WHOLE:
            h = _summed(parts_ptr, place + columns[None, :], here & there[None, :], stride, SLICES)
            acc = dot(narrow(h * gates, DTYPE, UP), early, acc, UP)
        else:
            if tl.max((gates != 0.0).to(tl.int32)) > 0:
                b = tl.load(b_ptr + columns[:, None], mask=there[:, None] & (wide < OUT)[None, :], other=0.0)
                h = _summed(parts_ptr, place + columns[None, :], here & there[None, :], stride, SLICES)
                acc = dot(narrow(h * gates, DTYPE, UP), b, acc, UP)
    tl.store(y_ptr, narrow(y.to(tl.float32) + acc, DTYPE, UP), mask=mask)


def options(kind: str) -> dict[str, Any]:
    """Launch options of both kernels; three stages of 64 experts would not fit into the 64 KiB of some devices."""
    return {"num_warps": 4, "num_stages": 3 if kind in ("ampere", "hopper") else 2, "enable_fp_fusion": True}


def blocks(kind: str, dtype: torch.dtype, ranks: int, columns: int) -> tuple[dict[str, int], dict[str, int]]:
    """Blocks of the two kernels: ranks and width of the first, width and ranks of the second.

    `columns` is EP, the columns of the router's tile: with many experts that tile must be short.
    """
    if kind == "interpreter":
        return {"BM": 16, "BN": 16, "BK": 16}, {"BM": 16, "BN": 32, "BK": 32}
    exact = dtype == torch.float32
    deep = max(16, min(64 if exact else 128, 4096 // columns))
    chunk = padded(ranks) if ranks <= MOST_RANKS and columns <= 64 else 32
    return {"BM": 16, "BN": 16, "BK": deep}, {"BM": 16, "BN": 32 if exact else 64, "BK": chunk}


def slices_of_width(width: int, block: int, programs: int, device: torch.device) -> tuple[int, int]:
    """Into how many slices of which width the sums are cut.

    Args:
        width: Of the input.
        block: What a program sums at a time.
        programs: Programs that one slice has.
        device: Where they run.

    Returns:
        The number of slices, a power of two up to 16 as the second kernel is compiled for it, and their width.
    """
    steps = triton.cdiv(width, block)
    wanted = min(16, steps, triton.cdiv(2 * processors(device), programs))
    per_slice = triton.cdiv(steps, 2 ** (wanted.bit_length() - 1)) * block
    return triton.next_power_of_2(triton.cdiv(width, per_slice)), per_slice


def few_constants(
    one: AdapterParts, choices: Choices, aligned: bool, slices: int, kind: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the two kernels are compiled for; `one` stands for the shapes and dtypes of all adapters."""
    experts, ranks = one.router.shape[0], one.a.shape[0]
    first, second = blocks(kind, one.a.dtype, ranks, padded_experts(experts, choices))
    routed, routing = routed_constants(one, choices, aligned), routing_constants(choices)
    sizes = {"E": experts, "R": ranks, "EP": padded_experts(experts, choices), "UP": INTERPRETED}
    bank = {"ALL": choices.bank(experts)}
    kept = min(choices.top_k, experts) if choices.selection == "top_k" else 0
    partial = {"ROUTED_BY": routed["ROUTED_BY"], "ALIGNED": aligned, "SELECTION": routing["SELECTION"]}
    expand = {**routed, **routing, **sizes, **bank, **second, "SLICES": slices, "K": kept}
    return {**partial, **sizes, **first}, expand


def launch(x: Tensor, y: Tensor, index: Tensor, known: Table, one: AdapterParts, choices: Choices) -> None:
    """Add to rows of at most `MOST_TOKENS` tokens; the arguments are those of `multi_adapter.launch`."""
    (rows, tokens, width), out, adapters = x.shape, y.shape[2], known.scales.numel()
    experts, ranks = one.router.shape[0], one.a.shape[0]
    kind = device_class(x.device)
    columns = padded_experts(experts, choices)
    first, second = blocks(kind, x.dtype, ranks, columns)
    tiles = triton.cdiv(ranks, first["BN"]) + 1
    slices, per_slice = slices_of_width(width, first["BK"], tiles * rows, x.device)
    partial, expand = few_constants(one, choices, known.aligned, slices, kind)
    parts = torch.empty(rows * slices * tokens * (ranks + columns), dtype=torch.float32, device=x.device)
    rows_partial[tiles, slices, rows](
        x, index, known.addresses, parts, tokens, width, per_slice, adapters, **partial, **options(kind)
    )
    rows_route_expand[triton.cdiv(out, second["BN"]), rows](
        y, index, known.addresses, known.scales, parts, tokens, out, adapters, choices.temperature, choices.top_p,
        choices.threshold, choices.max_threshold, **expand, **options(kind),
    )  # fmt: skip
