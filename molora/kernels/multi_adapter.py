"""One linear, many adapters: each row of a batch goes through the experts of its own adapter. Inference only.

With `a` the adapter of a row and `g_a(x)` its mixing weights, each spread over the ranks of its expert,

    y[row] += scale_a · (g_a(x) ⊙ (x A_aᵀ)) B_aᵀ

The adapters of one call have the same E, r and routing choices, with shared experts among these; their scales may
differ, and their matrices stay where they are: nothing is stacked or copied. Here is the plain-torch form. Rows are
grouped by adapter, whose products write into one buffer for all rows, so that routing runs once and not once per
adapter.
`molora.kernels.triton.multi_adapter` has the form for GPUs, two launches whatever the number of adapters.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from molora.errors import MoloraError
from molora.kernels.adapter_parts import AdapterParts
from molora.kernels.choices import Choices
from molora.kernels.mixture import mixing_weights
from molora.kernels.products import product_dtype
from molora.routing.precision import full_precision, promote

FEW_TOKENS = 64
"""From so many tokens on, scattered rows are products of their own; below, the rows of an adapter are copied together.
Measured with fp32, width 1024 on one CPU thread: copying takes 0.8 of the time at 16 tokens, 1.0 at 64, 1.2 at 128."""


class _Piece(NamedTuple):
    """Rows of one adapter: where they are in the batch, and their place `[start, stop)` among all adapted rows."""

    adapter: int
    rows: slice | Tensor
    start: int
    stop: int


def mixed_rows(
    x: Tensor,
    y: Tensor,
    index: Sequence[int],
    adapters: Sequence[AdapterParts],
    choices: Choices,
    backend: str | None = None,
) -> Tensor:
    """Add to each row of `y` what its adapter makes of that row of `x`.

    Args:
        x: `[N, S, in]`, N rows of S tokens.
        y: `[N, S, out]` in the dtype of `x`, changed in place.
        index: For each row the place of its adapter in `adapters`, -1 for none.
        adapters: All with the same shapes.
        choices: The routing choices of them all.
        backend: `"triton"` or `"torch"`; by default Triton for tensors on a CUDA device.

    Returns:
        `y`.

    Raises:
        MoloraError: If an adapter differs from the others in shape, `index` does not fit, or a gradient is wanted.
    """
    check(x, y, index, adapters, choices)
    with torch.no_grad(), full_precision(x):
        if backend == "triton" or (backend is None and x.is_cuda):
            from molora.kernels.triton.multi_adapter import mixed_rows_triton

            return mixed_rows_triton(x, y, index, adapters, choices)
        return _mixed_rows_torch(x, y, index, adapters, choices)


def check(x: Tensor, y: Tensor, index: Sequence[int], adapters: Sequence[AdapterParts], choices: Choices) -> None:
    """Refuse what would be wrong in silence; see `mixed_rows`."""
    rows = x.shape[0]
    if x.ndim != 3 or y.shape[:2] != x.shape[:2] or len(index) != rows:
        raise MoloraError(
            "Mixed rows need x [N, S, in], y [N, S, out] and one adapter for each of the N rows; got "
            f"x {list(x.shape)}, y {list(y.shape)} and {len(index)} adapters. Reshape x and y to three dimensions."
        )
    if rows and not (min(index) >= -1 and max(index) < len(adapters)):
        raise MoloraError(
            f"A row's adapter is a place in the list of {len(adapters)} adapters, or -1 for none; got {list(index)}."
        )
    if not adapters:
        return
    first = adapters[0]
    if any(
        one.a.shape != first.a.shape or one.router.shape != first.router.shape or one.b.shape != first.b.shape
        for one in adapters
    ):
        shapes = [(list(one.a.shape), list(one.router.shape), list(one.b.shape)) for one in adapters]
        raise MoloraError(
            f"The adapters of one call must have the same E, r, in and out; got (A, router, B) of {shapes}. "
            "Call once for each kind of adapter, with -1 for the other rows."
        )
    if choices.adaptive and any(one.threshold_row is None for one in adapters):
        raise MoloraError(
            "selection 'adaptive_threshold' needs a `threshold_row` of every adapter; at least one has none."
        )
    if torch.is_grad_enabled() and (
        x.requires_grad or y.requires_grad or any(one.a.requires_grad or one.router.requires_grad for one in adapters)
    ):
        raise MoloraError(
            "Mixed rows have no backward pass, and a tensor of this call wants a gradient. Call under "
            "`torch.no_grad()`, or run the rows of each adapter by themselves."
        )


@functools.lru_cache(maxsize=64)
def _pieces(index: tuple[int, ...], gather: bool, device: torch.device) -> tuple[_Piece, ...]:
    """Group the rows of a batch by adapter; every linear of every step asks for the same grouping.

    Args:
        index: For each row its adapter.
        gather: Whether scattered rows of one adapter are one piece, to be copied together, or one for each run.
        device: Where the numbers of such rows are needed.
    """
    rows_of: dict[int, list[int]] = {}
    for row, adapter in enumerate(index):
        if adapter >= 0:
            rows_of.setdefault(adapter, []).append(row)
    pieces, start = [], 0
    for adapter, rows in rows_of.items():
        breaks = [n for n in range(1, len(rows)) if rows[n] != rows[n - 1] + 1]
        ends = [0, *([] if gather else breaks), len(rows)]
        for begin, end in itertools.pairwise(ends):
            part = rows[begin:end]
            where = torch.tensor(part, device=device) if gather and breaks else slice(part[0], part[-1] + 1)
            pieces.append(_Piece(adapter, where, start, start + len(part)))
            start += len(part)
    return tuple(pieces)


def _mixed_rows_torch(
    x: Tensor, y: Tensor, index: Sequence[int], adapters: Sequence[AdapterParts], choices: Choices
) -> Tensor:
    """The plain-torch form: products of each adapter, one routing for all, a product of each adapter."""
    if not y.is_contiguous():
        return y.copy_(_mixed_rows_torch(x, y.contiguous(), index, adapters, choices))
    tokens = x.shape[1]
    pieces = _pieces(tuple(index), tokens < FEW_TOKENS, x.device) if tokens else ()
    if not pieces:
        return y
    ranks, experts = adapters[0].a.shape[0], adapters[0].router.shape[0]
    wide, exact = product_dtype(x.dtype, x.device), promote(x).dtype
    routed = experts + choices.adaptive
    total = pieces[-1].stop * tokens
    if wide == exact:
        both = x.new_empty(total, ranks + routed, dtype=exact)
        hidden, logits = both[:, :ranks], both[:, ranks:]
    else:
        hidden, logits = x.new_empty(total, ranks, dtype=wide), x.new_empty(total, routed, dtype=exact)
        both = None
    for piece in pieces:
        at = slice(piece.start * tokens, piece.stop * tokens)
        taken = x[piece.rows].reshape(-1, x.shape[2])
        _shrink(taken, adapters[piece.adapter], hidden[at], logits[at], None if both is None else both[at])
    level = logits[:, experts:]  # empty without a learned threshold
    weights = mixing_weights(logits[:, :experts], level, None, choices)
    hidden.unflatten(1, (weights.shape[1], -1)).mul_(weights.unsqueeze(-1))
    for piece in pieces:
        gated = hidden[piece.start * tokens : piece.stop * tokens]
        if isinstance(piece.rows, slice):
            _expand_(y[piece.rows].view(-1, y.shape[2]), gated, adapters[piece.adapter])
        else:
            taken = y.index_select(0, piece.rows)
            _expand_(taken.view(-1, y.shape[2]), gated, adapters[piece.adapter])
            y.index_copy_(0, piece.rows, taken)
    return y


def _shrink(x: Tensor, one: AdapterParts, hidden: Tensor, logits: Tensor, both: Tensor | None) -> None:
    """Fill the rows of one adapter: hidden `[T, R]`, logits `[T, E]` or `[T, E + 1]`; side by side in `both`, or not.

    What is routed by is multiplied in at least fp32, so that near-ties fall the same way everywhere.
    """
    experts = one.router.shape[0]
    precise = x.to(logits.dtype)
    if both is not None and one.stacked is not None and one.stacked.dtype == both.dtype:
        torch.mm(precise, one.stacked.T, out=both)
    else:
        torch.mm(x.to(hidden.dtype), one.a.to(hidden.dtype).T, out=hidden)
        torch.mm(precise, one.router.to(logits.dtype).T, out=logits[:, :experts])
        if logits.shape[1] > experts and one.threshold_row is not None:
            torch.mm(precise, one.threshold_row.to(logits.dtype).T, out=logits[:, experts:])
    if one.router_bias is not None:
        logits[:, :experts] += one.router_bias
    if logits.shape[1] > experts and one.threshold_bias is not None:
        logits[:, experts:] += one.threshold_bias


def _expand_(y: Tensor, gated: Tensor, one: AdapterParts) -> None:
    """Add the output of one adapter to its rows of `y`, `[T, out]`."""
    if y.dtype == gated.dtype:
        y.addmm_(gated, one.b.T, alpha=one.scale)
    else:
        y.add_(gated @ one.b.to(gated.dtype).T, alpha=one.scale)
