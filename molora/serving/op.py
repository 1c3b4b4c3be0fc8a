"""`molora::route_ranks`: between a server's two LoRA products, route each token and scale its rank rows in place.

An operation that compilers and captured graphs take whole: it has no output, waits for nothing, and reads what a slot
does from tables that stay where they are. `reference` does the same in plain torch, and a server on CPUs goes by it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from molora.errors import MoloraError
from molora.kernels.rank_codes import row_widths
from molora.serving.gate import Gate, rank_gate
from molora.serving.tables import Slot, SlotTables

# Not `custom_op`, whose wrappers take longer than a launch: this runs for every linear of every step.
_LIBRARY = torch.library.Library("molora", "FRAGMENT")
_LIBRARY.define(
    "route_ranks(Tensor(a!) buffer, Tensor? products, Tensor x, Tensor slots, Tensor ints, Tensor numbers, "
    "int experts) -> ()",
    # Compilers may neither break the graph here nor lay tensors out anew.
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)


def route_ranks(buffer: Tensor, products: Tensor, x: Tensor, slots: Tensor, tables: SlotTables) -> None:
    """Route every token by the gate of its slot; overwrite rank rows with factor times value, zero behind them.

    Rows of a slot with a plain LoRA stay as they are. Tokens without an adapter get zeros, whatever was there.

    Args:
        buffer: Products with the packed rows, `[N, T, R]` fp32, contiguous; changed in place.
        products: Where the router's are read: `buffer` itself, or a copy that was summed over processes.
        x: The tokens, `[T, in]`; read by gates with an `input_scale` only.
        slots: Each token's slot, `[T]` integers or longer; -1 for none.
        tables: Of this linear, on the device of `buffer`.

    Raises:
        MoloraError: If shapes, dtypes or devices do not fit together.
    """
    torch.ops.molora.route_ranks(
        buffer, None if products is buffer else products, x, slots, tables.ints, tables.numbers, tables.experts
    )


def reference(buffer: Tensor, products: Tensor, x: Tensor, slots: Tensor, gates: Sequence[Sequence[Slot]]) -> None:
    """The same in plain torch, slot by slot; see `route_ranks`.

    Args:
        buffer: `[N, T, R]`, changed in place.
        products: Likewise; may be `buffer`.
        x: `[T, in]`.
        slots: `[T]` or longer.
        gates: By slice and slot, as in `SlotTables`.
    """
    slots = slots[: buffer.shape[1]]
    for index, of_slot in enumerate(gates):
        rows, read = buffer[index], products[index]
        rows[(slots < 0) | (slots >= len(of_slot))] = 0.0
        for slot, gate in enumerate(of_slot):
            here = (slots == slot).nonzero()[:, 0]
            if gate == "off":
                rows[here] = 0.0
            elif isinstance(gate, Gate) and len(here):
                routed = torch.zeros_like(rows[here])
                routed[:, : gate.rank] = rows[here, : gate.rank] * rank_gate(read[here], gate, x[here])
                rows[here] = routed


def _routed(
    buffer: Tensor, products: Tensor | None, x: Tensor, slots: Tensor, ints: Tensor, numbers: Tensor, experts: int
) -> None:
    products = buffer if products is None else products
    if problem := _misfit(buffer, products, x, slots, ints, numbers, experts):
        raise MoloraError(problem)
    _kernel()(buffer, products, x, slots, ints, numbers, experts)


def _misfit(
    buffer: Tensor, products: Tensor, x: Tensor, slots: Tensor, ints: Tensor, numbers: Tensor, experts: int
) -> str | None:
    """What the kernel would read past the end of, or misread."""
    slices, tokens, ranks = buffer.shape
    wide_ints, wide_numbers = row_widths(experts, ranks)
    fits = (
        products.shape == buffer.shape
        and x.ndim == 2
        and x.shape[0] == tokens
        and slots.ndim == 1
        and slots.shape[0] >= tokens
        and ints.shape == (slices, numbers.shape[1], wide_ints)
        and numbers.shape == (slices, ints.shape[1], wide_numbers)
    )
    if not fits:
        return (
            "route_ranks wants buffer and products [N, T, R], x [T, in], slots [T] or longer, and tables made for N "
            f"slices and R ranks; got {list(buffer.shape)}, {list(products.shape)}, {list(x.shape)}, "
            f"{list(slots.shape)}, and rows of {ints.shape[2]} integers and {numbers.shape[2]} numbers for "
            f"{ints.shape[0]} slices, where R asks for {wide_ints} and {wide_numbers}."
        )
    if buffer.dtype != torch.float32 or products.dtype != torch.float32:
        return f"route_ranks takes buffer and products in fp32; got {buffer.dtype} and {products.dtype}."
    if not (buffer.is_contiguous() and products.is_contiguous() and slots.is_contiguous()) or x.stride(1) != 1:
        return "route_ranks takes contiguous buffer, products and slots, and contiguous rows of x; copy them first."
    return None


@functools.cache
def _kernel() -> Callable[..., None]:
    """The launch, found when it is first needed: not everywhere is Triton installed."""
    from molora.kernels.triton.route_ranks import launch_route_ranks

    return launch_route_ranks


def _interpreted(
    buffer: Tensor, products: Tensor | None, x: Tensor, slots: Tensor, ints: Tensor, numbers: Tensor, experts: int
) -> None:
    """On CPU tensors there is only Triton's interpreter, for tests."""
    from molora.kernels.triton.common import INTERPRETED

    if not INTERPRETED:
        raise MoloraError(
            "route_ranks is a kernel for GPUs, and got tensors on the CPU; call `molora.serving.op.reference` there."
        )
    _routed(buffer, products, x, slots, ints, numbers, experts)


def _fake(
    buffer: Tensor, products: Tensor | None, x: Tensor, slots: Tensor, ints: Tensor, numbers: Tensor, experts: int
) -> None:
    """There is no output to describe."""


_LIBRARY.impl("route_ranks", _routed, "CUDA")
_LIBRARY.impl("route_ranks", _interpreted, "CPU")
torch.library.register_fake("molora::route_ranks", _fake, lib=_LIBRARY)
