"""The fast path in plain torch: two products around the routing, with backward passes by hand.

`StackedDown` reads the input once. With the rows of A and of everything else that multiplies `x` (routers, threshold
nets, those of sibling linears too) stacked into `D [N, in]` it computes, and its backward, from `dh`, `dy`:

    h = x Dᵀ            y = x W0ᵀ + b                        dD = dhᵀ x            dx = dy W0 + dh D

`GatedUp` gates the small hidden and adds to the output of the frozen linear. With `g` the weight of each expert,
spread over its ranks and scaled, and `⟨·,·⟩ₑ` a sum over the ranks of expert e:

    u = g ⊙ h           y += u Bᵀ                            du = dy B             dB = dyᵀ u
                                                             dh = g ⊙ du           dwₑ = scaleₑ ⟨du, h⟩ₑ

What is kept for the backward pass is `x`, `h`, `w` and parameters, as far as needed; `u` is computed again. Nothing of
size `[T, E, out]` or `[T, E, in]` ever exists, nothing waits for the device and no shape depends on data. Between the
two lies routing, on `[T, E]`, in torch's own autograd, so every routing choice has this path.

Gradients of a gradient (`create_graph=True`) are refused rather than wrong; `MOLORA_KERNELS=reference` has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from molora.kernels.products import add_product_, product_dtype
from molora.routing.precision import full_precision


class Stack(NamedTuple):
    """What is stacked for one read of the input.

    Attributes:
        dtype: In which A is multiplied, and the hidden given.
        downs: How many of the matrices are rows of A; the others are multiplied in at least fp32.
        products: What the matrices give, if it was computed before; then only the backward pass is left to do.
    """

    dtype: torch.dtype
    downs: int
    products: tuple[Tensor, ...] | None = None


class _Product(NamedTuple):
    """Matrices that are multiplied as one: from `begin` to `stop` of those given, in `dtype`."""

    dtype: torch.dtype
    begin: int
    stop: int


def _products(stack: Stack, dtype: torch.dtype, device: torch.device, number: int) -> list[_Product]:
    """One product where all matrices are multiplied in the same precision, else one for A and one for the rest."""
    exact = dtype if dtype in (torch.float32, torch.float64) else torch.float32
    wide = product_dtype(stack.dtype, device)
    if exact == wide or stack.downs == number:
        return [_Product(wide, 0, number)] if number else []
    return [_Product(wide, 0, stack.downs), _Product(exact, stack.downs, number)]


def _stacked(matrices: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([matrix.to(dtype) for matrix in matrices]) if len(matrices) > 1 else matrices[0].to(dtype)


class StackedDown(torch.autograd.Function):
    """Every product of one input: `A x` of one or several linears, rows of routers, and the frozen linear itself."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, stack: Stack, *matrices: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Multiply.

        Args:
            ctx: Of autograd.
            x: `[..., in]`.
            weight: Frozen weight `[out, in]` to be multiplied too; `None` leaves it to the caller.
            bias: Its bias.
            stack: Which matrices are what.
            *matrices: `[N_i, in]`.

        Returns:
            The frozen linear's output `[..., out]` or `None`, then `[..., N_i]` for each matrix: those of A in the
            stack's dtype, the others in fp32 or fp64.
        """
        ctx.stack, ctx.shape, ctx.dtype, ctx.device = stack, x.shape, x.dtype, x.device
        ctx.set_materialize_grads(False)
        # Matrices get gradients from x, and x gets its own from matrices: nobody keeps what nobody needs.
        of_x, of_matrices = ctx.needs_input_grad[0], any(ctx.needs_input_grad[4:])
        ctx.save_for_backward(x if of_matrices else None, weight if of_x else None, *matrices)
        parts: list[Tensor] = []
        if stack.products is not None:
            return (None, *stack.products)
        with full_precision(x):
            y = None if weight is None else _linear(x, weight, bias)
            flat = x.reshape(x.shape[:-1].numel(), x.shape[-1])
            for dtype, begin, stop in _products(stack, x.dtype, x.device, len(matrices)):
                together = flat.to(dtype) @ _stacked(matrices[begin:stop], dtype).T
                # Parts of one tensor: a copy of each would be as long again in memory.
                parts += together.split([matrix.shape[0] for matrix in matrices[begin:stop]], dim=1)
        for place, part in enumerate(parts):
            part = part.to(stack.dtype) if place < stack.downs else part
            parts[place] = part if x.ndim == 2 else part.view(*x.shape[:-1], part.shape[1])
        return (y, *parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, *dparts: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of the input and of each matrix; `None` for what no output depended on."""
        x, weight, *matrices = ctx.saved_tensors
        tokens, needed, dx = ctx.shape[:-1].numel(), ctx.needs_input_grad[4:], None
        dmatrices: list[Tensor | None] = [None] * len(matrices)
        with full_precision(dy if dy is not None else next(part for part in dparts if part is not None)):
            if ctx.needs_input_grad[0] and dy is not None and weight is not None:
                wide = product_dtype(weight.dtype, ctx.device)
                dx = dy.reshape(tokens, dy.shape[-1]).to(wide) @ weight.to(wide)
            for dtype, begin, stop in _products(ctx.stack, ctx.dtype, ctx.device, len(matrices)):
                used = [place for place in range(begin, stop) if dparts[place] is not None]
                if not used:
                    continue
                chosen = [matrices[place] for place in used]
                small = _joined([dparts[place] for place in used], chosen, tokens, dtype)
                if ctx.needs_input_grad[0]:
                    stacked = _stacked(chosen, dtype)
                    dx = small @ stacked if dx is None else add_product_(dx, small, stacked)
                if x is not None and any(needed[place] for place in used):
                    found = (small.T @ x.reshape(tokens, x.shape[-1]).to(dtype)).split(
                        [matrix.shape[0] for matrix in chosen]
                    )
                    for place, matrix, gradient in zip(used, chosen, found, strict=True):
                        dmatrices[place] = gradient.to(matrix.dtype) if needed[place] else None
        return (None if dx is None else dx.to(ctx.dtype).view(ctx.shape), None, None, None, *dmatrices)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The frozen linear, bit for bit as it computes by itself."""
    y = torch.nn.functional.linear(x.to(weight.dtype), weight, bias)
    return _own(y, y.shape)


def _own(y: Tensor, shape: torch.Size) -> Tensor:
    """`y` in a shape, and no view: torch lets nobody write into views that a function returns."""
    return torch.ops.aten._unsafe_view(y, shape) if y._is_view() or y.shape != shape else y


def _joined(parts: Sequence[Tensor | None], matrices: Sequence[Tensor], tokens: int, dtype: torch.dtype) -> Tensor:
    """The gradients of the parts side by side, `[T, N]`."""
    pairs = zip(parts, matrices, strict=True)
    flat = [part.reshape(tokens, matrix.shape[0]).to(dtype) for part, matrix in pairs if part is not None]
    return flat[0] if len(flat) == 1 else torch.cat(flat, dim=1)


class Spread(NamedTuple):
    """How the weights of experts are spread over ranks.

    Attributes:
        scales: Scale of each expert: a number, or `[E]`.
        rank: Rank of every expert, or 0 if they differ.
        expert: `[R]`, the expert of each rank.
    """

    scales: float | Tensor
    rank: int
    expert: Tensor | None


NOT_SPREAD = Spread(1.0, 0, None)
"""For a hidden that is gated already."""


class GatedUp(torch.autograd.Function):
    """Gate the hidden, multiply by B, and add to the frozen linear's output."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, hidden: Tensor, weights: Tensor | None, up: Tensor, spread: Spread, in_place: bool
    ) -> Tensor:
        """Compute `y + B (g ⊙ h)`.

        Args:
            ctx: Of autograd.
            y: `[..., out]`.
            hidden: `[..., R]`, in the dtype that B is multiplied in.
            weights: `[..., E]` in fp32 or fp64, or shaped to broadcast; `None` where the hidden is gated already.
            up: B, `[out, R]`.
            spread: From experts to ranks.
            in_place: Write into `y`, which nobody else may have, nor keep for later as some modes of torch do.
        """
        ctx.spread = spread
        ctx.save_for_backward(hidden, weights, up)
        with full_precision(hidden):
            if in_place:
                ctx.mark_dirty(y)
            wide = product_dtype(hidden.dtype, hidden.device)
            gated = _gated(hidden, weights, spread, wide)
            if not in_place and y.dtype == wide:
                return _own(torch.addmm(y.reshape(gated.shape[0], y.shape[-1]), gated, up.to(wide).T), y.shape)
            result = y if in_place else y.clone(memory_format=torch.contiguous_format)
            add_product_(result.view(gated.shape[0], y.shape[-1]), gated, up.to(wide).T)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the output before, the hidden, the weights and B."""
        hidden, weights, up = ctx.saved_tensors
        spread: Spread = ctx.spread
        with full_precision(hidden):
            wide = product_dtype(hidden.dtype, hidden.device)
            flat = dy.reshape(hidden.shape[:-1].numel(), dy.shape[-1]).to(wide)
            dup = dhidden = dweights = None
            if ctx.needs_input_grad[3]:
                dup = (flat.T @ _gated(hidden, weights, spread, wide)).to(up.dtype)
            if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
                dgated = (flat @ up.to(wide)).view(hidden.shape)
                if weights is None:
                    dhidden = dgated.to(hidden.dtype)
                else:
                    dweights = _of_weights(dgated, hidden, weights, spread)
                    dhidden = _scaled(dgated, weights, spread).to(hidden.dtype)
        return dy, dhidden, dweights, dup, None, None


def _scaled(hidden: Tensor, weights: Tensor, spread: Spread) -> Tensor:
    """`g ⊙ h`, `[..., R]`, in the precision of the weights."""
    gates = weights * spread.scales
    if not spread.rank:
        return hidden * gates[..., spread.expert]
    if spread.rank == 1:
        return hidden * gates
    return (hidden.unflatten(-1, (-1, spread.rank)) * gates.unsqueeze(-1)).flatten(-2)


def _gated(hidden: Tensor, weights: Tensor | None, spread: Spread, dtype: torch.dtype) -> Tensor:
    """`u [T, R]` in the dtype it is multiplied in, rounded as the hidden is."""
    gated = hidden if weights is None else _scaled(hidden, weights, spread).to(hidden.dtype)
    return gated.reshape(gated.shape[:-1].numel(), gated.shape[-1]).to(dtype)


def _of_weights(dgated: Tensor, hidden: Tensor, weights: Tensor, spread: Spread) -> Tensor:
    """Gradient of the weights, in their shape: a sum over ranks, and over what they were broadcast to."""
    product = dgated.to(weights.dtype) * hidden
    if not spread.rank:
        # A product with a 0/1 matrix: sums in a fixed order, where adding by an index would not.
        assert spread.expert is not None
        experts = torch.arange(weights.shape[-1], device=weights.device)
        summed = product @ (spread.expert.unsqueeze(-1) == experts).to(product.dtype)
    else:
        summed = product if spread.rank == 1 else product.unflatten(-1, (-1, spread.rank)).sum(dim=-1)
    return (summed * spread.scales).sum_to_size(weights.shape)
