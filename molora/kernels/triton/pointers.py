"""Tables of addresses: how a kernel finds the matrices of many adapters, which stay the separate tensors they are.

A table is int64 `[6, adapters]` on the device; a kernel casts the address it needs to a pointer. Tables are remembered
by the addresses they hold, so a remembered one is never out of date, and the adapters of a batch's rows by their
values: every linear of every step asks for the same. Both are copied from pinned memory, without waiting for the
device.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from molora.kernels.choices import Choices

if TYPE_CHECKING:
    from molora.kernels.adapter_parts import AdapterParts

MATRIX_A = tl.constexpr(0)
ROUTER = tl.constexpr(1)
MATRIX_B = tl.constexpr(2)
ROUTER_BIAS = tl.constexpr(3)
THRESHOLD_ROW = tl.constexpr(4)
THRESHOLD_BIAS = tl.constexpr(5)
"""Rows of the table."""

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def pointer(table_ptr, row: tl.constexpr, adapters, adapter, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """What the table says about an adapter, as a pointer.

    Nothing is known about the alignment of a number, and without it loads are narrow: `ALIGNED` says it is a multiple
    of 16 bytes.
    """
    found = tl.load(table_ptr + row * adapters + adapter).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        found = tl.multiple_of(found, 16)
    return found


class Table(NamedTuple):
    """What the kernels know about the adapters of a call.

    Attributes:
        addresses: int64 `[6, adapters]`, zero for what an adapter has not.
        scales: fp32 `[adapters]`.
        aligned: Whether all begin at a multiple of 16 bytes, as memory of torch does unless a view begins within it.
    """

    addresses: Tensor
    scales: Tensor
    aligned: bool


def column(one: AdapterParts, adaptive: bool) -> tuple[int, ...]:
    """Addresses of one adapter, in the order of the table's rows."""
    level = (one.threshold_row, one.threshold_bias) if adaptive else (None, None)
    tensors = (one.a, one.router, one.b, one.router_bias, *level)
    return tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)


def routed_constants(one: AdapterParts, choices: Choices, aligned: bool) -> dict[str, Any]:
    """What kernels that route are compiled for, beside what those of one adapter are; `one` stands for all."""
    return {
        "ROUTED_BY": TYPES[one.router.dtype],
        "HAS_ROUTER_BIAS": one.router_bias is not None,
        "HAS_THRESHOLD_BIAS": choices.adaptive and one.threshold_bias is not None,
        "ALIGNED": aligned,
    }


@functools.lru_cache(maxsize=4096)
def table(columns: tuple[tuple[int, ...], ...], scales: tuple[float, ...], device: torch.device) -> Table:
    """Put the addresses of some adapters on a device."""
    rows = torch.tensor(columns, dtype=torch.int64).T.contiguous()
    # A bias is short and is not said to be aligned.
    aligned = all(address % 16 == 0 for one in columns for address in (*one[:3], one[4]))
    return Table(_sent(rows, device), _sent(torch.tensor(scales, dtype=torch.float32), device), aligned)


@functools.lru_cache(maxsize=256)
def indices(index: tuple[int, ...], device: torch.device) -> Tensor:
    """The adapter of each row on a device, int32 `[N]`."""
    return _sent(torch.tensor(index, dtype=torch.int32), device)


def _sent(values: Tensor, device: torch.device) -> Tensor:
    """Copy to the device without waiting for what it is doing."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values
