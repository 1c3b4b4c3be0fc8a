"""Block sizes: tables by device, ranks and dtype, chosen before a launch. Nothing is tuned at run time.

The entries follow two bounds that can be checked without a device: no register may spill (compiled ahead of time for
sm_80, sm_90 and gfx942 by the tests) and all stages fit into shared memory. Devices that are not known get blocks that
fit into 64 KiB. How fast they are among those that fit is not measured.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton import knobs

FEW_TOKENS = 64
"""Up to so many tokens a call is like decoding: small blocks, more programs, experts without tokens are skipped."""

WHOLE_RANKS = 128
"""Up to so many (padded) ranks one program takes all experts of its tokens."""


@dataclass(frozen=True)
class Tile:
    """Blocks of one launch.

    Attributes:
        BM: Tokens; ranks in `weight_gradient`.
        BN: Columns: ranks in `route_shrink` and `hidden_backward`, else the width.
        BK: What is summed over at a time: the width, ranks in `expand_add`, tokens in `weight_gradient`.
        num_warps: Warps of a program.
        num_stages: Depth of the software pipeline.
    """

    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, Any]:
        """What the launcher is given beside the arguments. FP fusion is said aloud, as its default changes."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


@functools.cache
def device_class(device: torch.device) -> str:
    """`interpreter`, `ampere` (sm_80), `hopper` (sm_90, sm_100), `cdna` (gfx9) or `unknown`."""
    if knobs.runtime.interpret or device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName
        return "cdna" if name.startswith(("gfx90a", "gfx94", "gfx95")) else "unknown"
    capability = torch.cuda.get_device_capability(device)
    return {(8, 0): "ampere", (9, 0): "hopper", (10, 0): "hopper"}.get(capability, "unknown")


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors, or what stands for them."""
    return (
        2 if device_class(device) == "interpreter" else torch.cuda.get_device_properties(device).multi_processor_count
    )


def padded(count: int) -> int:
    """The next power of two that a dot can take."""
    return max(16, triton.next_power_of_2(count))


def shrink_tile(device: torch.device, dtype: torch.dtype, tokens: int, experts: int, ranks: int, columns: int) -> Tile:
    """Blocks of `route_shrink`.

    Args:
        device: Where it runs.
        dtype: Of x.
        tokens: T.
        experts: E.
        ranks: R.
        columns: EP, columns of the router's tile.
    """
    return shrink_table(device_class(device), dtype, tokens <= FEW_TOKENS, ranks, columns)


def shrink_table(kind: str, dtype: torch.dtype, few: bool, ranks: int, columns: int) -> Tile:
    """Blocks of `route_shrink` on a kind of device."""
    if kind == "interpreter":
        return Tile(32, min(padded(ranks), 32), 32, 4, 1)
    stages = 2 if kind in ("cdna", "unknown") else 3
    if dtype == torch.float32:
        return Tile(16 if few or columns > 16 else 32, min(padded(ranks), 32 if few else 64), 32, 4, 2)
    if few:
        # Few blocks of tokens: ranks are spread over programs, or most of the device would idle.
        deep = 128 if stages == 3 else 64
        return Tile(16, min(padded(ranks), 32), deep if columns <= 64 else 32, 4, stages)
    # The router's tile has three sums, one for each part of an fp32 router.
    narrow = kind == "unknown" or columns > 32
    return Tile(64 if columns <= 128 else 16, min(padded(ranks), WHOLE_RANKS), 32 if narrow else 64, 8, stages)


def expand_tile(device: torch.device, dtype: torch.dtype, tokens: int, ranks: int) -> Tile:
    """Blocks of `expand_add`; see `shrink_tile`."""
    return expand_table(device_class(device), dtype, tokens <= FEW_TOKENS, ranks)


def expand_table(kind: str, dtype: torch.dtype, few: bool, ranks: int) -> Tile:
    """Blocks of `expand_add` on a kind of device."""
    if kind == "interpreter":
        return Tile(32, 64, 32, 4, 1)
    if dtype == torch.float32:
        return Tile(16, 64, 16, 4, 2) if few else Tile(32, 64, 16, 8, 2)
    if few:
        return Tile(16, 128, 16, 4, 2)
    return Tile(64, 64 if kind == "unknown" else 128, min(padded(ranks), 64), 8, 2)


def backward_tile(device: torch.device, dtype: torch.dtype, tokens: int, experts: int, rank: int) -> Tile:
    """Blocks of `hidden_backward`; BN is the padded ranks of all experts, shared ones too, or of a group of them."""
    return backward_table(device_class(device), dtype, tokens <= FEW_TOKENS, experts, rank)


def backward_table(kind: str, dtype: torch.dtype, few: bool, experts: int, rank: int) -> Tile:
    """Blocks of `hidden_backward` on a kind of device."""
    ranks = padded(triton.next_power_of_2(experts) * triton.next_power_of_2(rank))
    if kind == "interpreter":
        return Tile(32, min(ranks, 64), 32, 4, 1)
    stages = 2 if kind in ("cdna", "unknown") else 3
    if dtype == torch.float32:
        return Tile(16, min(ranks, WHOLE_RANKS), 32, 4, 2)
    return Tile(16 if few else 64, min(ranks, WHOLE_RANKS), 32 if kind == "unknown" else 64, 4 if few else 8, stages)


def gradient_tile(device: torch.device, dtype: torch.dtype, ranks: int, exact: int) -> Tile:
    """Blocks of `weight_gradient`; `exact` is its X; see `shrink_tile`."""
    return gradient_table(device_class(device), dtype, ranks, exact)


def gradient_table(kind: str, dtype: torch.dtype, ranks: int, exact: int) -> Tile:
    """Blocks of `weight_gradient` on a kind of device."""
    if kind == "interpreter":
        return Tile(32, 64, 32, 4, 1)
    if dtype == torch.float32:
        return Tile(min(padded(ranks), 32), 64, 32, 4, 2)
    stages = 2 if kind in ("cdna", "unknown") else 3
    wide = 64 if kind == "unknown" or exact > 32 else 128
    return Tile(min(padded(ranks), 64), wide if exact <= 128 else 32, 32 if kind == "unknown" else 64, 8, stages)
