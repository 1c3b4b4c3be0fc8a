"""One pass over the gradient of y' gives the gradients of the hidden, of the logits and of the threshold logit.

    dhg = gy B      dh = scale · repeat(w, RANK) ⊙ dhg      dw = dw_aux + scale · Σ_rank dhg ⊙ h
    dv = (dw − Σ w dw) / Σv if weights were divided by Σv, else dw; zero where not selected
    dz = dz_aux + p (dv − Σ p dv) / temperature, or dz_aux + dv p (1 − p) / temperature for sigmoids
    dt = dt_aux − Σ dv · level · (1 − sigmoid(t)), the sum only if weights are p − level

Layout: `gy [T, OUT]`, `b [OUT, R]`, `h [T, R]`; in fp32 `weights [T, ALL]` and `logits [T, E]`, the gradients of both
from auxiliary losses, `threshold_logit` and its gradient `[T, 1]`. Out: `packed [T, WIDTH]` in x's dtype,
`[dh | dz | dt | 0]`, which one product with `[A; W; v; 0]` turns into the adapter's part of dx; and `exact [T, X]`,
`[dz | dt]` in fp32, X = E or E + 1, from which the router's own gradients follow.

Decisions:
- A program owns whole rows of tokens, so no sum crosses programs: no atomics, the same bits every time.
- Ranks are laid out as `[experts, ranks padded to RP]`, and the sum over a rank is a reshape and a `tl.sum`. A product
  with a 0/1 matrix would say the same and spills registers.
- More than `WHOLE_RANKS` padded ranks: a program takes a group of experts, leaves its part of dw to `gate_backward`.
- Which experts were selected is read off the weights, not decided again: a probability that differs in the last bit
  from the forward pass's must not select another expert.
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
    dot,
    gate_gradient,
    gate_values,
    narrow,
    packed_width,
    routing_constants,
    sigmoid,
)
from molora.kernels.triton.tiles import Tile, backward_tile


@triton.jit
def _store_gate_gradient(
    dw,
    w,
    logits_ptr,
    threshold_logit_ptr,
    dlogits_ptr,
    dthreshold_ptr,
    dweights_ptr,
    packed_ptr,
    exact_ptr,
    rows,
    T,
    temperature,
    threshold,
    max_threshold,
    E: tl.constexpr,
    ALL: tl.constexpr,
    R: tl.constexpr,
    WIDTH: tl.constexpr,
    SIGMOID: tl.constexpr,
    SELECTION: tl.constexpr,
    MINUS: tl.constexpr,
    RENORM: tl.constexpr,
    UP: tl.constexpr,
):
    """From the experts' part of dw and from w `[BM, EP]` to dz and dt, stored twice: packed and exact.

    Both are zero for shared experts, whose weights depend on nothing.
    """
    X: tl.constexpr = E + 1 if SELECTION == ADAPTIVE else E
    expert = tl.arange(0, dw.shape[1])
    is_expert = tl.broadcast_to((expert < E)[None, :], dw.shape)
    place = rows[:, None] * E + expert[None, :]
    mask = (rows < T)[:, None] & is_expert
    p = gate_values(tl.load(logits_ptr + place, mask=mask, other=0.0), is_expert, temperature, SIGMOID)
    if dweights_ptr is not None:
        dw += tl.load(dweights_ptr + rows[:, None] * ALL + expert[None, :], mask=mask, other=0.0)
    squashed = tl.zeros_like(tl.sum(dw, 1))
    level = squashed + threshold
    if SELECTION == ADAPTIVE:
        squashed = sigmoid(tl.load(threshold_logit_ptr + rows, mask=rows < T, other=0.0))
        level = max_threshold * squashed
    dv, dz = gate_gradient(dw, w, p, level, temperature, SIGMOID, MINUS, RENORM)
    if dlogits_ptr is not None:
        dz += tl.load(dlogits_ptr + place, mask=mask, other=0.0)
    tl.store(exact_ptr + rows[:, None] * X + expert[None, :], dz, mask=mask)
    dtype: tl.constexpr = packed_ptr.dtype.element_ty
    tl.store(packed_ptr + rows[:, None] * WIDTH + (R + expert)[None, :], narrow(dz, dtype, UP), mask=mask)
    if SELECTION == ADAPTIVE:
        dt = tl.zeros_like(level)
        if MINUS:
            dt -= tl.sum(dv, 1) * level * (1.0 - squashed)
        if dthreshold_ptr is not None:
            dt += tl.load(dthreshold_ptr + rows, mask=rows < T, other=0.0)
        tl.store(exact_ptr + rows * X + E, dt, mask=rows < T)
        tl.store(packed_ptr + rows * WIDTH + R + E, narrow(dt, dtype, UP), mask=rows < T)


@triton.jit
def hidden_backward(
    gy_ptr,
    b_ptr,
    h_ptr,
    weights_ptr,
    logits_ptr,
    threshold_logit_ptr,
    dlogits_ptr,
    dthreshold_ptr,
    dweights_ptr,
    packed_ptr,
    exact_ptr,
    partial_ptr,
    T,
    OUT,
    scale,
    temperature,
    threshold,
    max_threshold,
    E: tl.constexpr,
    ALL: tl.constexpr,
    RANK: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    RP: tl.constexpr,
    WHOLE: tl.constexpr,
    SIGMOID: tl.constexpr,
    SELECTION: tl.constexpr,
    MINUS: tl.constexpr,
    RENORM: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    UP: tl.constexpr,
):
    """Grid: (groups of GROUP experts, blocks of tokens). Unless a group is the WHOLE, it fills `partial [T, ALL]`."""
    R: tl.constexpr = ALL * RANK
    rows = tl.program_id(1).to(tl.int64) * BM + tl.arange(0, BM)
    first = tl.program_id(0) * GROUP
    here, n = (rows < T)[:, None], tl.arange(0, GROUP * RP)
    expert = first + tl.arange(0, GROUP)
    dw = tl.zeros((BM, GROUP), tl.float32)
    # One round, unless the rank of one expert is more than a program can hold.
    for low in tl.static_range(0, RANK, RP):
        # Without padding the compiler is to see one run of addresses.
        columns = first * RANK + n if RP == RANK else (first + n // RP) * RANK + low + n % RP
        there = (columns < R) if RP == RANK else (first + n // RP < ALL) & (low + n % RP < RANK)
        acc = tl.zeros((BM, GROUP * RP), tl.float32)
        for start in range(0, OUT, BK):
            k = start + tl.arange(0, BK)
            gy = tl.load(gy_ptr + rows[:, None] * OUT + k[None, :], mask=here & (k < OUT)[None, :], other=0.0)
            b = tl.load(
                b_ptr + k[:, None].to(tl.int64) * R + columns[None, :],
                mask=(k < OUT)[:, None] & there[None, :],
                other=0.0,
            )
            acc = dot(gy, b, acc, UP)
        mask = here & there[None, :]
        h = tl.load(h_ptr + rows[:, None] * R + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        dw += tl.sum(tl.reshape(acc * h, (BM, GROUP, RP)), 2)
        gates = tl.load(weights_ptr + rows[:, None] * ALL + (first + n // RP)[None, :], mask=mask, other=0.0)
        tl.store(
            packed_ptr + rows[:, None] * WIDTH + columns[None, :],
            narrow(acc * gates * scale, packed_ptr.dtype.element_ty, UP),
            mask=mask,
        )
    dw *= scale
    place = rows[:, None] * ALL + expert[None, :]
    if WHOLE:
        w = tl.load(weights_ptr + place, mask=here & (expert < E)[None, :], other=0.0)
        dw = tl.where((expert < E)[None, :], dw, 0.0)
        _store_gate_gradient(
            dw, w, logits_ptr, threshold_logit_ptr, dlogits_ptr, dthreshold_ptr, dweights_ptr, packed_ptr,
            exact_ptr, rows, T, temperature, threshold, max_threshold, E, ALL, R, WIDTH, SIGMOID, SELECTION, MINUS,
            RENORM, UP,
        )  # fmt: skip
    else:
        tl.store(partial_ptr + place, dw, mask=here & (expert < ALL)[None, :])


@triton.jit
def gate_backward(
    partial_ptr,
    weights_ptr,
    logits_ptr,
    threshold_logit_ptr,
    dlogits_ptr,
    dthreshold_ptr,
    dweights_ptr,
    packed_ptr,
    exact_ptr,
    T,
    temperature,
    threshold,
    max_threshold,
    E: tl.constexpr,
    ALL: tl.constexpr,
    R: tl.constexpr,
    WIDTH: tl.constexpr,
    EP: tl.constexpr,
    SIGMOID: tl.constexpr,
    SELECTION: tl.constexpr,
    MINUS: tl.constexpr,
    RENORM: tl.constexpr,
    BM: tl.constexpr,
    UP: tl.constexpr,
):
    """The gate's part where the experts do not fit into one program. Grid: (blocks of tokens,)."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    expert = tl.arange(0, EP)[None, :]
    place, mask = rows[:, None] * ALL + expert, (rows < T)[:, None] & (expert < E)
    dw = tl.load(partial_ptr + place, mask=mask, other=0.0)
    w = tl.load(weights_ptr + place, mask=mask, other=0.0)
    _store_gate_gradient(
        dw, w, logits_ptr, threshold_logit_ptr, dlogits_ptr, dthreshold_ptr, dweights_ptr, packed_ptr,
        exact_ptr, rows, T, temperature, threshold, max_threshold, E, ALL, R, WIDTH, SIGMOID, SELECTION, MINUS, RENORM,
        UP,
    )  # fmt: skip


def backward_constants(experts: int, rank: int, choices: Choices, tile: Tile) -> dict[str, Any]:
    """What `hidden_backward` is compiled for.

    Args:
        experts: E.
        rank: Rank of each expert.
        choices: Routing choices.
        tile: Block sizes; BN is GROUP·RP.
    """
    rank_block = min(triton.next_power_of_2(rank), tile.BN)
    group, bank = tile.BN // rank_block, choices.bank(experts)
    return {
        "E": experts,
        "ALL": bank,
        "RANK": rank,
        "WIDTH": packed_width(bank * rank, experts, choices),
        "GROUP": group,
        "RP": rank_block,
        "WHOLE": group >= bank,
        "BM": tile.BM,
        "BK": tile.BK,
        "UP": INTERPRETED,
        **routing_constants(choices),
    }


GATE_OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
"""Of `gate_backward`, which does no products: the same on every device."""


def gate_constants(constants: dict[str, Any]) -> dict[str, Any]:
    """What `gate_backward` is compiled for, given the same of `hidden_backward`."""
    same = ("E", "ALL", "WIDTH", "SIGMOID", "SELECTION", "MINUS", "RENORM", "UP")
    columns = triton.next_power_of_2(constants["E"])
    ranks = constants["ALL"] * constants["RANK"]
    return {
        **{name: constants[name] for name in same},
        "R": ranks,
        "EP": columns,
        "BM": max(1, min(32, 2048 // columns)),
    }


def launch_hidden_backward(
    gy: Tensor,
    b: Tensor,
    h: Tensor,
    logits: Tensor,
    threshold_logit: Tensor,
    weights: Tensor,
    aux: tuple[Tensor | None, Tensor | None, Tensor | None],
    scale: float,
    choices: Choices,
) -> tuple[Tensor, Tensor]:
    """`packed [T, WIDTH]` and `exact [T, X]`; see the top. All contiguous, gradients of fp32 tensors in fp32.

    Args:
        gy: `[T, out]`.
        b: `[out, R]`.
        h: `[T, R]`.
        logits: `[T, E]`.
        threshold_logit: `[T, 1]` or empty.
        weights: `[T, ALL]`.
        aux: Gradients that come from elsewhere, of logits `[T, E]`, threshold logit `[T, 1]` and weights `[T, ALL]`.
        scale: Factor of every expert.
        choices: Routing choices.
    """
    tokens, width = gy.shape
    experts, bank = logits.shape[1], weights.shape[1]
    rank = h.shape[1] // bank
    exact = logits.new_empty(tokens, experts + choices.adaptive)
    tile = backward_tile(gy.device, gy.dtype, tokens, bank, rank)
    constants = backward_constants(experts, rank, choices, tile)
    padded = constants["WIDTH"] > h.shape[1] + exact.shape[1]
    packed = (torch.zeros if padded else torch.empty)(tokens, constants["WIDTH"], dtype=h.dtype, device=h.device)
    partial = None if constants["WHOLE"] else torch.empty_like(weights)
    blocks = triton.cdiv(tokens, tile.BM)
    level = (choices.temperature, choices.threshold, choices.max_threshold)
    given = (weights, logits, threshold_logit, *aux, packed, exact)
    hidden_backward[triton.cdiv(bank, constants["GROUP"]), blocks](
        gy, b, h, *given, partial, tokens, width, scale, *level, **constants, **tile.options
    )
    if partial is not None:
        constants = gate_constants(constants)
        gate_backward[(triton.cdiv(tokens, constants["BM"]),)](
            partial, *given, tokens, *level, **constants, **GATE_OPTIONS
        )
    return packed, exact
