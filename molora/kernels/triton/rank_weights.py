"""From the logits of one token to the weights of its experts, with choices that are read, not compiled in.

What `molora.routing.route` does at inference, for one token: every tensor is `[E]`, padded. A slot of a server may
hold any mixture, so each choice is a number that all threads of a program read alike and branch on.
"""

# mypy: disallow-untyped-defs=False
# The arguments of a jitted function are Triton's: pointers and tensors of blocks.
from __future__ import annotations

import triton
import triton.language as tl

from molora.kernels import rank_codes as codes
from molora.kernels.triton.common import TINY

SIGMOID = tl.constexpr(codes.GATE_CODES["sigmoid"])
RELU = tl.constexpr(codes.GATE_CODES["relu"])
SPARSEMAX = tl.constexpr(codes.GATE_CODES["sparsemax"])
IDENTITY = tl.constexpr(codes.GATE_CODES["identity"])

DENSE = tl.constexpr(codes.SELECTION_CODES["dense"])
TOP_K = tl.constexpr(codes.SELECTION_CODES["top_k"])
MAGNITUDE = tl.constexpr(codes.SELECTION_CODES["top_k_magnitude"])
TOP_P = tl.constexpr(codes.SELECTION_CODES["top_p"])
THRESHOLD = tl.constexpr(codes.SELECTION_CODES["threshold"])
ONE_OR_TWO = tl.constexpr(codes.SELECTION_CODES["top_1_or_2"])
GROUPED = tl.constexpr(codes.SELECTION_CODES["grouped_top_1"])

MINUS = tl.constexpr(codes.WEIGHT_CODES["probability_minus_threshold"])
BIASED = tl.constexpr(codes.WEIGHT_CODES["biased_probability"])
SELECTED_SOFTMAX = tl.constexpr(codes.WEIGHT_CODES["selected_softmax"])
ONE = tl.constexpr(codes.WEIGHT_CODES["one"])


@triton.jit
def over(values, divisor):
    """Divided by a number; rounded correctly, as torch's division is."""
    return tl.div_rn(values, tl.full(values.shape, divisor, tl.float32))


@triton.jit
def sigmoid(z):
    """Of `[E]`."""
    ones = tl.full(z.shape, 1.0, tl.float32)
    return tl.div_rn(ones, ones + tl.exp(-z))


@triton.jit
def softmax(z, among):
    """Over the experts among which to choose, zero elsewhere; all zero where there are none."""
    z = tl.where(among, z, float("-inf"))
    best = tl.max(z, 0)
    grown = tl.where(among, tl.exp(z - best), 0.0)
    total = tl.sum(grown, 0)
    return over(grown, tl.where(total == 0.0, 1.0, total))


@triton.jit
def best_of(left):
    """The largest value, and where it is: one place, the first among equals."""
    expert = tl.arange(0, left.shape[0])
    best = tl.max(left, 0)
    return best, expert == tl.min(tl.where(left == best, expert, left.shape[0]), 0)


@triton.jit
def _sparsemax(z, is_expert, count):
    """The point of the simplex closest to z: values are taken from the largest down, not sorted."""
    left = tl.where(is_expert, z, float("-inf"))
    total = tl.full((), 0.0, tl.float32)
    excess = total
    support = total
    for rank in range(count):
        best, hit = best_of(left)
        left = tl.where(hit, float("-inf"), left)
        total += best
        inside = (rank + 1) * best > total - 1.0
        support += tl.where(inside, 1.0, 0.0)
        excess = tl.where(inside, total - 1.0, excess)
    level = tl.div_rn(excess, tl.maximum(support, 1.0))
    return tl.where(z - level <= 0.0, 0.0, z - level)


@triton.jit
def probabilities(z, is_expert, count, temperature, GATE):
    """The gate's output, zero in the padding."""
    z = over(z, temperature)
    if GATE == SIGMOID:
        p = sigmoid(z)
    elif GATE == RELU:
        p = tl.where(z <= 0.0, 0.0, z)  # keeps NaN
    elif GATE == SPARSEMAX:
        p = _sparsemax(z, is_expert, count)
    elif GATE == IDENTITY:
        p = z
    else:
        p = softmax(z, is_expert)
    return tl.where(is_expert, p, 0.0)


@triton.jit
def _best_few(keys, is_expert, k):
    """Exactly `k`, the first ones among equals."""
    left = tl.where(is_expert, keys, float("-inf"))
    taken = tl.zeros(keys.shape, tl.int32)
    for _ in range(k):
        _, hit = best_of(left)
        taken = tl.where(hit, 1, taken)
        left = tl.where(hit, float("-inf"), left)
    return taken


@triton.jit
def _share_of_total(keys, is_expert, count, top_p):
    """The fewest whose share of the total reaches `top_p`; the best in any case."""
    left = tl.where(is_expert, keys, float("-inf"))
    _, hit = best_of(left)
    taken = tl.where(hit, 1, 0)
    total = tl.maximum(tl.sum(tl.where(is_expert, keys, 0.0), 0), TINY)
    reached = tl.full((), 0.0, tl.float32)
    for _ in range(count):
        best, hit = best_of(left)
        share = tl.div_rn(best, total)
        reached += share
        wanted = tl.full(keys.shape, reached - share, tl.float32) < top_p
        taken = tl.where(hit & wanted, 1, taken)
        left = tl.where(hit, float("-inf"), left)
    return taken


@triton.jit
def _one_or_two(keys, is_expert, gap):
    """The best, and the second unless it lies further behind than `gap`."""
    left = tl.where(is_expert, keys, float("-inf"))
    best, first = best_of(left)
    second, other = best_of(tl.where(first, float("-inf"), left))
    near = tl.full(keys.shape, best - second, tl.float32) <= gap
    return tl.where(first | (other & near), 1, 0)


@triton.jit
def _best_of_each_group(keys, is_expert, count, groups):
    expert = tl.arange(0, keys.shape[0])
    size = count // groups
    taken = tl.zeros(keys.shape, tl.int32)
    for group in range(groups):
        in_group = is_expert & (expert // size == group)
        _, hit = best_of(tl.where(in_group, keys, float("-inf")))
        taken = tl.where(hit & in_group, 1, taken)
    return taken


@triton.jit
def selected(keys, is_expert, count, level, top_p, gap, k, groups, exact_zeros, SELECTION):
    """1 for the experts that the token keeps, else 0. Not booleans, which AMD keeps in scalar registers that spill."""
    if SELECTION == TOP_K:
        taken = _best_few(keys, is_expert, k)
    elif SELECTION == MAGNITUDE:
        taken = _best_few(tl.abs(keys), is_expert, k)
    elif SELECTION == TOP_P:
        taken = _share_of_total(keys, is_expert, count, top_p)
    elif SELECTION == THRESHOLD:
        taken = tl.where(keys >= level, 1, 0)
    elif SELECTION == ONE_OR_TWO:
        taken = _one_or_two(keys, is_expert, gap)
    elif SELECTION == GROUPED:
        taken = _best_of_each_group(keys, is_expert, count, groups)
    else:
        taken = tl.where((keys != 0.0) | (exact_zeros == 0), 1, 0)
    return tl.where(is_expert, taken, 0)


@triton.jit
def weights_of(z, p, keys, keep, level, temperature, WEIGHTS):
    """How much each kept expert counts; anything for the others."""
    if WEIGHTS == MINUS:
        values = p - level
    elif WEIGHTS == BIASED:
        values = keys
    elif WEIGHTS == SELECTED_SOFTMAX:
        values = softmax(over(z, temperature), keep)
    elif WEIGHTS == ONE:
        values = tl.full(p.shape, 1.0, tl.float32)
    else:
        values = p
    return values


@triton.jit
def sparsemixer(z, is_expert, k, reach):
    """Experts chosen one after another, each by a softmax over those close to the best that is left.

    Returns:
        1 for those chosen, and their weights.
    """
    left = tl.where(is_expert, z, float("-inf"))
    taken = tl.zeros(z.shape, tl.int32)
    values = tl.zeros(z.shape, tl.float32)
    for _ in range(k):
        best = tl.max(left, 0)
        distance = tl.div_rn(best - z, tl.maximum(tl.abs(z), best))
        # Not `<=`: among zeros the distance is NaN, and those compete.
        near = (left > float("-inf")) & ~(distance > reach)
        p = softmax(left, near)
        _, hit = best_of(p)
        hit = hit & near
        taken = tl.where(hit, 1, taken)
        values = tl.where(hit, p, values)
        left = tl.where(hit, float("-inf"), left)
    return taken, values


@triton.jit
def mixed(values, keep, counted, renormalize):
    """Weights of the experts that were kept, zero elsewhere; null experts take part in the selection only."""
    values = tl.where(keep & counted, values, 0.0)
    total = tl.sum(values, 0)
    if renormalize > 0:
        values = over(values, tl.where(total > 0.0, total, 1.0))
    return values
