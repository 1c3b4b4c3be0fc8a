"""Launches that the kernels are compiled for without a device: what is checked for spilled registers.

Sizes and block sizes are those of real calls, on the table of the given kind of device. Import this without
TRITON_INTERPRET: kernels decorated for the interpreter cannot be compiled.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from molora.kernels.choices import Choices
from molora.kernels.triton.common import packed_width, padded_experts
from molora.kernels.triton.expand_add import expand_add, expand_constants
from molora.kernels.triton.hidden_backward import (
    GATE_OPTIONS,
    backward_constants,
    gate_backward,
    gate_constants,
    hidden_backward,
)
from molora.kernels.triton.route_ranks import OPTIONS, rank_constants, route_ranks
from molora.kernels.triton.route_shrink import route_shrink, shrink_constants
from molora.kernels.triton.tiles import Tile, backward_table, expand_table, gradient_table, shrink_table
from molora.kernels.triton.weight_gradient import gradient_constants, weight_gradient


@dataclass(frozen=True)
class Specimen:
    """One launch.

    Attributes:
        name: Says kernel, sizes and choices.
        kernel: The jitted function.
        signature: Type of every argument that is no constant, such as `*bf16`, `i32` or `fp32`.
        constexprs: Constants, among them pointers that are `None`.
        num_warps: Warps of a program.
        num_stages: Depth of the pipeline.
        divisible_by_16: Arguments that are multiples of 16, or aligned so.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    divisible_by_16: tuple[str, ...]


SIZES = {"E8 r8": (8, 8), "E8 r16": (8, 16), "E16 r16": (16, 16), "E64 r1": (64, 1)}
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
SCALARS = ("temperature", "top_p", "threshold", "max_threshold", "scale")
WIDTHS = ("IN", "OUT", "N", "per_slice")
EXACT = (
    "router",
    "logits",
    "threshold",
    "weights",
    "balance",
    "dlogits",
    "dthreshold",
    "dweights",
    "exact",
    "partial",
)
"""Starts of the names of pointers to fp32, whatever x is."""

MODES = {
    "top_k": Choices("softmax", "top_k", renormalize=True, top_k=2),
    "dense": Choices("sigmoid", "dense", temperature=0.5),
    "top_p": Choices("softmax", "top_p", top_p=0.6, renormalize=True),
    "threshold": Choices("sigmoid", "threshold", threshold=0.5),
    "adaptive_threshold": Choices(
        "softmax", "adaptive_threshold", minus_threshold=True, renormalize=True, max_threshold=0.125
    ),
}

SHARED = replace(MODES["top_k"], shared_experts=2)


def specimens(kind: str = "ampere") -> list[Specimen]:
    """Every launch worth compiling, of many tokens and of few.

    Args:
        kind: Whose block sizes, as `device_class` names them.
    """
    found: list[Specimen] = []
    for size, (experts, rank) in SIZES.items():
        for mode, choices in MODES.items():
            chosen = replace(choices, top_k=4) if experts == 64 and mode == "top_k" else choices
            found += _routed(kind, f"{size} {mode}", experts, rank, chosen, torch.bfloat16)
        found += _products(kind, size, experts, rank, torch.bfloat16)
    for mode in ("top_k", "adaptive_threshold"):
        found += _routed(kind, f"E6 r3 {mode}", 6, 3, MODES[mode], torch.bfloat16)
        found += _routed(kind, f"E8 r8 {mode}", 8, 8, MODES[mode], torch.float32)
    found += _routed(kind, "E8 r8 top_k", 8, 8, MODES["top_k"], torch.float16)
    found += _routed(kind, "E6 + 2 r8 top_k", 6, 8, SHARED, torch.bfloat16)
    found += _routed(kind, "E14 + 2 r16 top_k", 14, 16, SHARED, torch.bfloat16)
    for dtype in (torch.float16, torch.float32):
        found += _products(kind, "E8 r8", 8, 8, dtype)
    return [*found, *_served()]


def _served() -> Iterator[Specimen]:
    """The kernel of servers, for small tables and for the largest; it has no products, and no use of wide loads."""
    for experts, ranks in ((8, 16), (16, 64), (128, 128), (128, 512)):
        for dtype in ("bf16", "fp32"):
            types = {"x_ptr": f"*{dtype}", "slots_ptr": "*i64", "ints_ptr": "*i32"}
            types |= dict.fromkeys(("T", "IN", "x_stride", "SLOTS"), "i32")
            constants = rank_constants(experts, ranks)
            signature = {name: types.get(name, "*fp32") for name in route_ranks.arg_names if name not in constants}
            aligned = tuple(name for name, kind in signature.items() if kind[0] == "*" or name in ("IN", "x_stride"))
            depth = (OPTIONS["num_warps"], OPTIONS["num_stages"])
            name = f"route_ranks E{experts} R{ranks}, few rows of {dtype}"
            yield Specimen(name, route_ranks, signature, constants, *depth, divisible_by_16=aligned)


def _routed(kind: str, name: str, experts: int, rank: int, choices: Choices, dtype: torch.dtype) -> Iterator[Specimen]:
    """The kernels that know the routing choices."""
    bank = choices.bank(experts)
    ranks = bank * rank
    absent = () if choices.adaptive else ("threshold_row_ptr", "threshold_bias_ptr", "dthreshold_ptr")
    for few in (False, True):
        text = f"{name} {TYPES[dtype][1:]}{' few' if few else ''}"
        tile = shrink_table(kind, dtype, few, ranks, padded_experts(experts, choices))
        constants = shrink_constants(experts, ranks, choices, tile)
        yield _specimen(f"route_shrink {text}", route_shrink, dtype, constants, absent, _depth(tile))
        tile = backward_table(kind, dtype, few, bank, rank)
        constants = backward_constants(experts, rank, choices, tile)
        without = absent if not constants["WHOLE"] else (*absent, "partial_ptr")
        yield _specimen(f"hidden_backward {text}", hidden_backward, dtype, constants, without, _depth(tile))
        if not constants["WHOLE"] and not few:
            constants = gate_constants(constants)
            depth = (GATE_OPTIONS["num_warps"], GATE_OPTIONS["num_stages"])
            yield _specimen(f"gate_backward {text}", gate_backward, dtype, constants, absent, depth)


def _products(kind: str, name: str, experts: int, rank: int, dtype: torch.dtype) -> Iterator[Specimen]:
    """The kernels that know only weights."""
    ranks = experts * rank
    for few in (False, True):
        tile = expand_table(kind, dtype, few, ranks)
        constants = expand_constants(experts, ranks, few, tile)
        text = f"{name} {TYPES[dtype][1:]}{' few' if few else ''}"
        yield _specimen(f"expand_add {text}", expand_add, dtype, constants, (), _depth(tile))
    for side in ("down", "up"):
        down = side == "down"
        tile = gradient_table(kind, dtype, ranks, experts if down else 0)
        stride = packed_width(ranks, experts, MODES["top_k"]) if down else ranks
        constants = gradient_constants(ranks, experts, stride, experts if down else 0, not down, tile)
        text = f"weight_gradient {side} {name} {TYPES[dtype][1:]}"
        absent = ("weights_ptr",) if down else ("exact_ptr",)
        yield _specimen(text, weight_gradient, dtype, constants, absent, _depth(tile))


def _specimen(
    name: str,
    kernel: Any,
    dtype: torch.dtype,
    constants: dict[str, Any],
    absent: tuple[str, ...],
    depth: tuple[int, int],
) -> Specimen:
    """Types follow from the names of arguments; widths of layers are multiples of 16, counts of tokens are not."""
    names = kernel.arg_names
    constexprs = {**constants, "UP": False, **{pointer: None for pointer in absent if pointer in names}}
    signature = {argument: _type(argument, dtype) for argument in names if argument not in constexprs}
    aligned = tuple(argument for argument, kind in signature.items() if kind[0] == "*" or argument in WIDTHS)
    return Specimen(name, kernel, signature, constexprs, *depth, divisible_by_16=aligned)


def _depth(tile: Tile) -> tuple[int, int]:
    return tile.num_warps, tile.num_stages


def _type(argument: str, dtype: torch.dtype) -> str:
    if argument in SCALARS:
        return "fp32"
    if argument in ("T", *WIDTHS):
        return "i32"
    is_exact = argument.startswith((*EXACT, "parts"))
    return "*fp32" if is_exact else TYPES[dtype]
