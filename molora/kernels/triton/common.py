"""What all kernels of one mixture share: dots, exact products of fp32 with 16 bits, the gate, and sizes of a call.

Letters of every kernel: T tokens, IN and OUT widths, E routed experts, ALL experts with the shared ones, which stand
behind them and count fully for every token, RANK ranks each, R = ALL·RANK. Blocks: BM tokens, BN
columns, BK of the width that is summed over. EP is E (plus one for a threshold's column) padded to a power of two.

`UP` upcasts 16-bit operands. The interpreter needs it: it keeps bf16 as integers and multiplies those, silently.
"""

# mypy: disallow-untyped-defs=False
# The arguments of a jitted function are Triton's: pointers and tensors of blocks.
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton import knobs

from molora.kernels.choices import Choices

DENSE = tl.constexpr(0)
TOP_K = tl.constexpr(1)
TOP_P = tl.constexpr(2)
THRESHOLD = tl.constexpr(3)
ADAPTIVE = tl.constexpr(4)
SELECTION_CODES = {"dense": 0, "top_k": 1, "top_p": 2, "threshold": 3, "adaptive_threshold": 4}

TINY = tl.constexpr(1.1754943508222875e-38)
"""The smallest normal fp32: marks a selected expert whose weight is zero by rounding."""

INTERPRETED = bool(knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter, on CPU tensors. Fixed when this package is imported."""


@triton.jit
def dot(left, right, acc, UP: tl.constexpr):
    """`acc + left @ right`, accumulated in fp32; products of fp32 are exact fp32 products, never tf32."""
    if UP:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, acc, input_precision="ieee")


@triton.jit
def narrow(value, dtype: tl.constexpr, UP: tl.constexpr):
    """Round fp32 to a dtype. The interpreter would cut bf16 off instead of rounding it to the nearest."""
    if UP and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        value = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return value.to(dtype)


@triton.jit
def split(value, dtype: tl.constexpr):
    """Three 16-bit parts of fp32 values, whose sum has all of its bits.

    fp16 has few exponents, so there the second part is 2¹¹ and the third 2²² times as large as what it stands for;
    `combine` takes that back.
    """
    step: tl.constexpr = 2048.0 if dtype == tl.float16 else 1.0
    high = value.to(dtype)
    rest = (value - high.to(tl.float32)) * step
    middle = rest.to(dtype)
    low = ((rest - middle.to(tl.float32)) * step).to(dtype)
    return high, middle, low


@triton.jit
def combine(high, middle, low, dtype: tl.constexpr):
    """The sum of products with the three parts; smallest first, so that little is rounded away."""
    step: tl.constexpr = 1.0 / 2048.0 if dtype == tl.float16 else 1.0
    return high + (middle + low * step) * step


@triton.jit
def gate_values(z, is_expert, temperature, SIGMOID: tl.constexpr):
    """Probabilities `[BM, EP]`, zero in the padding, from logits. Division is rounded correctly, as torch's is."""
    z = tl.div_rn(z, tl.full(z.shape, temperature, tl.float32))
    if SIGMOID:
        ones = tl.full(z.shape, 1.0, tl.float32)
        p = tl.div_rn(ones, ones + tl.exp(-z))
    else:
        z = tl.where(is_expert, z, float("-inf"))
        grown = tl.exp(z - tl.max(z, 1)[:, None])
        p = tl.div_rn(grown, tl.broadcast_to(tl.sum(grown, 1)[:, None], z.shape))
    return tl.where(is_expert, p, 0.0)


@triton.jit
def sigmoid(x):
    """Of fp32 `[BM]`, with exact division."""
    ones = tl.full(x.shape, 1.0, tl.float32)
    return tl.div_rn(ones, ones + tl.exp(-x))


@triton.jit
def selected_experts(keys, is_expert, level, top_p, E: tl.constexpr, SELECTION: tl.constexpr, K: tl.constexpr):
    """Boolean `[BM, EP]`: which experts a token keeps. `level` is `[BM, EP]`."""
    column = tl.broadcast_to(tl.arange(0, keys.shape[1])[None, :], keys.shape)
    if SELECTION == DENSE:
        keep = is_expert
    elif SELECTION == THRESHOLD or SELECTION == ADAPTIVE:  # noqa: SIM109  # Triton has no `in`
        keep = (keys >= level) & is_expert
    else:
        left = tl.where(is_expert, keys, float("-inf"))
        # Not booleans: AMD keeps those in scalar registers, which then spill.
        taken = tl.zeros(keys.shape, tl.int32)
        if SELECTION == TOP_K:
            for _ in range(K):
                best = tl.max(left, 1)[:, None]
                hit = column == tl.min(tl.where(left == best, column, keys.shape[1]), 1)[:, None]
                taken = tl.where(hit, 1, taken)
                left = tl.where(hit, float("-inf"), left)
        else:
            total = tl.maximum(tl.sum(tl.where(is_expert, keys, 0.0), 1), TINY)
            reached = tl.zeros_like(total)
            for rank in range(E):
                best = tl.max(left, 1)
                hit = column == tl.min(tl.where(left == best[:, None], column, keys.shape[1]), 1)[:, None]
                share = tl.div_rn(best, total)
                reached += share
                wanted = (reached - share < top_p) | (rank == 0)
                taken = tl.where(hit & wanted[:, None], 1, taken)
                left = tl.where(hit, float("-inf"), left)
        keep = taken > 0
    return keep


@triton.jit
def mixing_weights(p, keep, level, MINUS: tl.constexpr, RENORM: tl.constexpr):
    """Weights `[BM, EP]` of the experts that were kept, zero elsewhere."""
    keep = keep | (p != p)
    values = p
    if MINUS:
        values = p - level
    values = tl.where(keep, values, 0.0)
    if RENORM:
        total = tl.sum(values, 1)
        total = tl.where(total > 0.0, total, 1.0)
        values = tl.div_rn(values, tl.broadcast_to(total[:, None], values.shape))
    return tl.where(keep & (values == 0.0), TINY, values)


@triton.jit
def gate_gradient(dw, w, p, level, temperature, SIGMOID: tl.constexpr, MINUS: tl.constexpr, RENORM: tl.constexpr):
    """From the gradient of the weights `[BM, EP]` to those of `v`, the values before they were divided, and of logits.

    `level` is `[BM]`. What was selected is read off the weights.
    """
    selected = w != 0.0
    dv = dw
    if RENORM:
        values = p
        if MINUS:
            values = p - level[:, None]
        # The weights sum to one exactly where they were divided by a positive sum.
        divided = tl.sum(w, 1) > 0.5
        total = tl.where(divided, tl.maximum(tl.sum(tl.where(selected, values, 0.0), 1), TINY), 1.0)
        dv = tl.where(divided[:, None], (dw - tl.sum(w * dw, 1)[:, None]) / total[:, None], dw)
    dv = tl.where(selected, dv, 0.0)
    dz = dv * p * (1.0 - p) if SIGMOID else p * (dv - tl.sum(p * dv, 1)[:, None])
    return dv, dz / temperature


def padded_experts(experts: int, choices: Choices) -> int:
    """EP of a router tile: room for the experts, a threshold's column and one of shared experts; enough for a dot."""
    return max(16, triton.next_power_of_2(experts + max(choices.adaptive, choices.shared_experts > 0)))


def packed_width(ranks: int, experts: int, choices: Choices) -> int:
    """Columns of `packed`: a multiple of eight, as matrix products of 16 bits want rows of whole 16 bytes."""
    return triton.cdiv(ranks + experts + choices.adaptive, 8) * 8


def routing_constants(choices: Choices) -> dict[str, Any]:
    """The choices that a kernel is compiled for."""
    return {
        "SIGMOID": choices.gate == "sigmoid",
        "SELECTION": SELECTION_CODES[choices.selection],
        "MINUS": choices.minus_threshold,
        "RENORM": choices.renormalize,
    }


def slices_of(tokens: int, block: int, programs: int, wanted: int) -> tuple[int, int]:
    """Into how many slices of how many tokens a sum over tokens is cut.

    Args:
        tokens: T.
        block: Tokens that a program takes at once.
        programs: Programs that one slice has.
        wanted: Programs that fill the device.

    Returns:
        The number of slices, and tokens per slice: whole blocks, at least four of them.
    """
    blocks = triton.cdiv(tokens, block)
    slices = max(1, min(triton.cdiv(wanted, programs), blocks // 4))
    per_slice = triton.cdiv(blocks, slices)
    return triton.cdiv(blocks, per_slice), per_slice * block


def check_equal_ranks(a: torch.Tensor, router: torch.Tensor, choices: Choices) -> None:
    """Refuse experts that cannot have equal ranks.

    Args:
        a: `[R, in]`.
        router: `[E, in]`.
        choices: Routing choices.

    Raises:
        ValueError: If the ranks are no multiple of the experts.
    """
    experts, ranks = choices.bank(router.shape[0]), a.shape[0]
    if ranks % experts:
        raise ValueError(f"{ranks} rows of A for {experts} experts; the kernels need experts of equal rank.")
