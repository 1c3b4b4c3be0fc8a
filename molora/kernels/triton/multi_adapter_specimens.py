"""Launches of the kernels for many adapters that are compiled without a device; see `specimens`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from molora.kernels.adapter_parts import AdapterParts
from molora.kernels.choices import Choices
from molora.kernels.triton.common import padded_experts
from molora.kernels.triton.expand_add import expand_constants
from molora.kernels.triton.few_tokens import few_constants, options, rows_partial, rows_route_expand
from molora.kernels.triton.multi_adapter import rows_expand_add, rows_route_shrink
from molora.kernels.triton.pointers import routed_constants
from molora.kernels.triton.route_shrink import shrink_constants
from molora.kernels.triton.specimens import MODES, SHARED, SIZES, TYPES, Specimen
from molora.kernels.triton.tiles import expand_table, shrink_table

WIDTH = 4096
SLICES = 8
POINTERS = {"index_ptr": "*i32", "table_ptr": "*i64", **dict.fromkeys(("x_ptr", "y_ptr", "h_ptr"), "")}
"""Types of pointers that are not to fp32; an empty one stands for that of x."""
COUNTS = ("S", "IN", "OUT", "per_slice", "adapters")


def specimens(kind: str = "ampere") -> list[Specimen]:
    """Every launch worth compiling.

    Args:
        kind: Whose block sizes, as `device_class` names them.
    """
    found: list[Specimen] = []
    for size, (experts, rank) in SIZES.items():
        found += _of_adapter(kind, f"{size} top_k", experts, rank, MODES["top_k"], torch.bfloat16)
    for mode in ("top_p", "adaptive_threshold"):
        found += _of_adapter(kind, f"E8 r8 {mode}", 8, 8, MODES[mode], torch.bfloat16)
    found += _of_adapter(kind, "E64 r1 adaptive_threshold", 64, 1, MODES["adaptive_threshold"], torch.bfloat16)
    found += _of_adapter(kind, "E6 r3 adaptive_threshold", 6, 3, MODES["adaptive_threshold"], torch.bfloat16)
    found += _of_adapter(kind, "E8 r8 top_k", 8, 8, MODES["top_k"], torch.float32)
    for experts, rank in ((6, 8), (6, 16), (14, 16)):
        found += _of_adapter(kind, f"E{experts} + 2 r{rank} top_k", experts, rank, SHARED, torch.bfloat16)
    return found


def _of_adapter(
    kind: str, name: str, experts: int, rank: int, choices: Choices, dtype: torch.dtype
) -> Iterator[Specimen]:
    """The launches for rows of one token and of many."""
    bank = choices.bank(experts)
    ranks, name = bank * rank, f"{name} {TYPES[dtype][1:]}"

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    level = (empty(1, WIDTH), empty(1)) if choices.adaptive else (None, None)
    one = AdapterParts(
        empty(ranks, WIDTH, dtype=dtype),
        empty(experts, WIDTH),
        empty(WIDTH, ranks, dtype=dtype),
        1.0,
        empty(experts) if choices.adaptive else None,
        *level,
    )
    tile = shrink_table(kind, dtype, False, ranks, padded_experts(experts, choices))
    constants = routed_constants(one, choices, True) | shrink_constants(experts, ranks, choices, tile)
    yield _specimen(f"rows_route_shrink {name}", rows_route_shrink, dtype, constants, tile.num_warps, tile.num_stages)
    tile = expand_table(kind, dtype, False, ranks)
    constants = {"ALIGNED": True, **expand_constants(bank, ranks, False, tile)}
    yield _specimen(f"rows_expand_add {name}", rows_expand_add, dtype, constants, tile.num_warps, tile.num_stages)
    warps, stages = options(kind)["num_warps"], options(kind)["num_stages"]
    partial, expand = few_constants(one, choices, True, SLICES, kind)
    yield _specimen(f"rows_partial {name} few", rows_partial, dtype, partial, warps, stages)
    yield _specimen(f"rows_route_expand {name} few", rows_route_expand, dtype, expand, warps, stages)


def _specimen(
    name: str, kernel: Any, dtype: torch.dtype, constants: dict[str, Any], warps: int, stages: int
) -> Specimen:
    """Widths are multiples of 16, tokens of a row and adapters are any number."""
    constexprs = {**constants, "UP": False}
    signature = {}
    for argument in kernel.arg_names:
        if argument not in constexprs:
            default = "*fp32" if argument.endswith("_ptr") else "i32" if argument in COUNTS else "fp32"
            signature[argument] = POINTERS.get(argument, default) or TYPES[dtype]
    aligned = tuple(name for name in signature if name.endswith("_ptr") or name in ("IN", "OUT", "per_slice"))
    return Specimen(name, kernel, signature, constexprs, warps, stages, aligned)
