"""Between a server's two LoRA products: route each token and scale its rank rows in place.

The first product, of a token with `[A; W; v]`, has its rank rows in front and what routes behind. A program takes one
token of one slice, looks up how the token's slot routes, decides, and overwrites the row: rank rows times the weight
and scale of their expert, zero behind them. The tables are those of `molora.kernels.rank_codes`.

Layout: `buffer` and `products [N, T, R]` fp32, N slices that share an input; `x [T, IN]`; `slots [T]` or longer,
any integers; `ints` and `numbers [N, SLOTS + 1, ...]`, of which the last slot is that of tokens without an adapter.

Decisions:
- What a mixture does is data, not code: branches are alike for all threads of a program, so they cost little, and a
  captured graph goes on to be right when a slot gets another mixture.
- Zeros are written, not multiplied: rows of tokens without an adapter may hold anything, NaN too.
- A barrier lies between the last read and the first write, as `buffer` may be `products`.
- Products and sums are not fused, so that near-ties fall as they do in torch.
"""

# mypy: disallow-untyped-defs=False
# The arguments of a jitted function are Triton's: pointers and tensors of blocks.
from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from molora.kernels import rank_codes as codes
from molora.kernels.triton import _device_of
from molora.kernels.triton.common import TINY
from molora.kernels.triton.rank_weights import (
    RELU,
    SPARSEMAX,
    mixed,
    over,
    probabilities,
    selected,
    sigmoid,
    sparsemixer,
    weights_of,
)

INTEGERS = tl.constexpr(len(codes.INTEGERS))
NUMBERS = tl.constexpr(len(codes.NUMBERS))
OFF = tl.constexpr(codes.OFF)
ROUTED = tl.constexpr(codes.ROUTED)


def _places(places: dict[str, int], names: str) -> list[tl.constexpr]:
    """Where the named columns are; a kernel reads no globals but such constants."""
    return [tl.constexpr(places[name]) for name in names.split()]


MODE, RANK, LOGITS, NULL, FIRST, ROWS, PARTS, LEARNED = _places(
    codes.INTEGER_PLACES, "mode rank logits null first rows parts learned"
)
SOURCE, INPUT_SCALE, NORMED, GATE, SELECTION = _places(
    codes.INTEGER_PLACES, "source input_scale normed gate selection"
)
COUNT_K, GROUPS, WEIGHTS, RENORMALIZE, REMAINDER = _places(
    codes.INTEGER_PLACES, "top_k groups weights renormalize remainder"
)
GATE_TEMPERATURE, TEMPERATURE, LEVEL, MAX_THRESHOLD, THRESHOLD_OFFSET = _places(
    codes.NUMBER_PLACES, "gate_temperature temperature level max_threshold threshold_offset"
)
SHARE, GAP, MIN_LOGIT, LOGIT_NORM, REACH = _places(codes.NUMBER_PLACES, "top_p top_gap min_logit logit_norm reach")

BY_MAGNITUDE = tl.constexpr(codes.SOURCE_CODES["magnitude"])
UNIT = tl.constexpr(codes.SOURCE_CODES["unit_activation"])
NORM = tl.constexpr(codes.SOURCE_CODES["activation_norm"])
STANDARDIZE = tl.constexpr(codes.INPUT_SCALE_CODES["standardize"])
SPARSEMIXER = tl.constexpr(codes.SELECTION_CODES["sparsemixer"])


@triton.jit
def _input_factor(x, IN, kind, BX: tl.constexpr):
    """One over the deviation or the length of the token's input; see `molora.serving.gate.input_factor`."""
    mean = tl.full((), 0.0, tl.float32)
    if kind == STANDARDIZE:
        total = tl.zeros((BX,), tl.float32)
        for start in range(0, IN, BX):
            k = start + tl.arange(0, BX)
            total += tl.load(x + k, mask=k < IN, other=0.0).to(tl.float32)
        mean = tl.div_rn(tl.sum(total, 0), IN * 1.0)
    squares = tl.zeros((BX,), tl.float32)
    for start in range(0, IN, BX):
        k = start + tl.arange(0, BX)
        away = tl.where(k < IN, tl.load(x + k, mask=k < IN, other=0.0).to(tl.float32) - mean, 0.0)
        squares += away * away
    square = tl.sum(squares, 0)
    if kind == STANDARDIZE:
        size = tl.sqrt_rn(tl.div_rn(square, IN * 1.0) + 1e-5)
    else:
        size = tl.maximum(tl.sqrt_rn(square), 1e-12)
    return tl.div_rn(tl.full((), 1.0, tl.float32), size)


@triton.jit
def _parts(products, ints, index, mask, factor):
    """Values `[E]` of the numbered rows that logits come from: the parts of each added up, times the factor."""
    parts, rows, first = tl.load(ints + PARTS), tl.load(ints + ROWS), tl.load(ints + FIRST)
    value = tl.zeros(index.shape, tl.float32)
    for done in range(parts):  # the smallest part first, so that nothing of it is lost
        value += tl.load(products + first + (parts - 1 - done) * rows + index, mask=mask, other=0.0)
    return value * factor


@triton.jit
def _level(products, ints, numbers, E: tl.constexpr):
    """The threshold, `[E]` alike: fixed, or learned and read from the last row of each part."""
    level = tl.full((E,), tl.load(numbers + LEVEL), tl.float32)
    if tl.load(ints + LEARNED) > 0:
        parts, rows = tl.load(ints + PARTS), tl.load(ints + ROWS)
        t = tl.full((), 0.0, tl.float32)
        for done in range(parts):
            t += tl.load(products + tl.load(ints + RANK) + (parts - done) * rows - 1)
        t = t + tl.load(numbers + THRESHOLD_OFFSET)
        level = tl.load(numbers + MAX_THRESHOLD) * sigmoid(tl.full((E,), t, tl.float32))
    return level


@triton.jit
def _expert_norms(products, ints, is_expert, factor, E: tl.constexpr):
    """How strongly each expert's ranks react."""
    expert = tl.arange(0, E)
    first = tl.load(ints + INTEGERS + expert)
    ranks = tl.where(is_expert, tl.load(ints + INTEGERS + E + expert), 0)
    squares = tl.zeros((E,), tl.float32)
    for rank in range(tl.max(ranks, 0)):
        value = _parts(products, ints, first + rank, rank < ranks, factor)
        squares += value * value
    return tl.where(squares > 0.0, tl.sqrt_rn(tl.maximum(squares, TINY)), 0.0)


@triton.jit
def _logits(products, ints, numbers, is_expert, factor, E: tl.constexpr):
    """Logits `[E]`, zero in the padding: from products with a router's rows, or from those with A."""
    expert = tl.arange(0, E)
    source = tl.load(ints + SOURCE)
    if source == NORM:
        z = _expert_norms(products, ints, is_expert, factor, E)
    else:
        z = _parts(products, ints, expert, is_expert, factor) + tl.load(numbers + NUMBERS + expert)
    if source == BY_MAGNITUDE:
        z = tl.abs(z)
    elif source == UNIT:
        z = over(z, tl.maximum(tl.sqrt_rn(tl.sum(tl.where(is_expert, z * z, 0.0), 0)), 1e-12))
    if tl.load(ints + NORMED) > 0:
        count = tl.sum(tl.where(is_expert, 1.0, 0.0), 0)
        mean = tl.div_rn(tl.sum(tl.where(is_expert, z, 0.0), 0), count)
        away = tl.where(is_expert, z - mean, 0.0)
        spread = tl.sqrt_rn(tl.div_rn(tl.sum(away * away, 0), count) + 1e-12)
        z = over(tl.load(numbers + LOGIT_NORM) * away, spread)
    return tl.where(is_expert, z, 0.0)


@triton.jit
def _routed(z, level, ints, numbers, is_expert, count, E: tl.constexpr):
    """By gate, selection and weighing: 1 for the experts kept, and what they count."""
    expert = tl.arange(0, E)
    gate, selection = tl.load(ints + GATE), tl.load(ints + SELECTION)
    p = probabilities(z, is_expert, count, tl.load(numbers + GATE_TEMPERATURE), gate)
    keys = p + tl.load(numbers + NUMBERS + E + expert)
    exact_zeros = ((gate == RELU) | (gate == SPARSEMAX)).to(tl.int32)
    keep = selected(
        keys, is_expert, count, level, tl.load(numbers + SHARE), tl.load(numbers + GAP), tl.load(ints + COUNT_K),
        tl.load(ints + GROUPS), exact_zeros, selection,
    )  # fmt: skip
    keep = tl.where(z >= tl.load(numbers + MIN_LOGIT), keep, 0)
    # NaN is kept, so that it is seen in what comes out instead of vanishing.
    keep = tl.where(is_expert & (p != p), 1, keep)
    values = weights_of(z, p, keys, keep > 0, level, tl.load(numbers + TEMPERATURE), tl.load(ints + WEIGHTS))
    return keep, values


@triton.jit
def _weights(products, x, ints, numbers, IN, E: tl.constexpr, BX: tl.constexpr):
    """Weights of the experts, `[E]`, and of each shared one."""
    expert = tl.arange(0, E)
    count = tl.load(ints + LOGITS)
    is_expert = expert < count
    factor = tl.full((), 1.0, tl.float32)
    scale = tl.load(ints + INPUT_SCALE)
    if scale > 0:
        factor = _input_factor(x, IN, scale, BX)
    z = _logits(products, ints, numbers, is_expert, factor, E)
    if tl.load(ints + SELECTION) == SPARSEMIXER:
        keep, values = sparsemixer(z, is_expert, tl.load(ints + COUNT_K), tl.load(numbers + REACH))
    else:
        level = _level(products, ints, numbers, E)
        keep, values = _routed(z, level, ints, numbers, is_expert, count, E)
    counted = expert < count - tl.load(ints + NULL)
    weights = mixed(values, keep > 0, counted, tl.load(ints + RENORMALIZE))
    shared = 1.0 - tl.where(tl.load(ints + REMAINDER) > 0, tl.sum(weights, 0), 0.0)
    return weights, shared


@triton.jit
def _scale(buffer, weights, shared, ints, numbers, R: tl.constexpr, E: tl.constexpr, BR: tl.constexpr):
    """Overwrite a row: rank rows times their factors, zero behind them."""
    rank, routed = tl.load(ints + RANK), tl.load(ints + LOGITS) - tl.load(ints + NULL)
    for start in range(0, R, BR):
        r = start + tl.arange(0, BR)
        inside = r < rank
        expert = tl.load(ints + INTEGERS + 2 * E + r, mask=inside, other=0)
        scale = tl.load(numbers + NUMBERS + 2 * E + r, mask=inside, other=0.0)
        value = tl.load(buffer + r, mask=inside, other=0.0)
        factor = tl.where(expert < routed, tl.gather(weights, tl.minimum(expert, E - 1), 0), shared)
        tl.store(buffer + r, tl.where(inside, value * (factor * scale), 0.0), mask=r < R)


# Counts of tokens change from step to step; a kernel for each kind of number would be compiled while serving.
@triton.jit(do_not_specialize=["T", "SLOTS"])
def route_ranks(
    buffer_ptr,
    products_ptr,
    x_ptr,
    slots_ptr,
    ints_ptr,
    numbers_ptr,
    T,
    IN,
    x_stride,
    SLOTS,
    R: tl.constexpr,
    E: tl.constexpr,
    BR: tl.constexpr,
    BX: tl.constexpr,
):
    """Grid: (tokens, slices). `SLOTS` are those of adapters, without the last."""
    token, index = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    # Rows behind those of a captured graph's batch may hold any number.
    slot = tl.where((slot < 0) | (slot > SLOTS), SLOTS, slot)
    ints = ints_ptr + (index * (SLOTS + 1) + slot) * (INTEGERS + 2 * E + R)
    numbers = numbers_ptr + (index * (SLOTS + 1) + slot) * (NUMBERS + 2 * E + R)
    row = (index * T + token) * R
    mode = tl.load(ints + MODE)
    if mode == ROUTED:
        weights, shared = _weights(products_ptr + row, x_ptr + token * x_stride, ints, numbers, IN, E, BX)
        tl.debug_barrier()
        _scale(buffer_ptr + row, weights, shared, ints, numbers, R, E, BR)
    elif mode == OFF:
        for start in range(0, R, BR):
            r = start + tl.arange(0, BR)
            tl.store(buffer_ptr + row + r, tl.zeros((BR,), tl.float32), mask=r < R)


def rank_constants(experts: int, ranks: int) -> dict[str, Any]:
    """What the kernel is compiled for.

    Args:
        experts: E of the table.
        ranks: R of the table.
    """
    return {"R": ranks, "E": experts, "BR": min(triton.next_power_of_2(ranks), 128), "BX": 512}


OPTIONS: dict[str, Any] = {"num_warps": 1, "num_stages": 1, "enable_fp_fusion": False}
"""One warp: it takes a whole row of experts, and talks to itself without barriers."""


def launch_route_ranks(
    buffer: Tensor, products: Tensor, x: Tensor, slots: Tensor, ints: Tensor, numbers: Tensor, experts: int
) -> None:
    """Route and scale in place; the shapes are checked by who calls.

    Args:
        buffer: `[N, T, R]` fp32, contiguous.
        products: Likewise; may be `buffer`.
        x: `[T, in]`, its rows contiguous.
        slots: `[T]` or longer.
        ints: `[N, SLOTS + 1, ...]` int32.
        numbers: `[N, SLOTS + 1, ...]` fp32.
        experts: E of the tables.
    """
    slices, tokens, ranks = buffer.shape
    if not tokens:
        return
    with _device_of(buffer):
        route_ranks[tokens, slices](
            buffer, products, x, slots, ints, numbers, tokens, x.shape[1], x.stride(0), ints.shape[1] - 1,
            **rank_constants(experts, ranks), **OPTIONS,
        )  # fmt: skip
