"""The fast path in plain torch: two products around the routing, with backward passes by hand.

`StackedDown` reads the input once. With the rows of A and of everything else that multiplies `x` (routers, threshold
nets, those of sibling linears too) stacked into `D [N, in]` it computes, and its backward, from `dh`, `dy`:

    h = x Dᵀ            y = x W0ᵀ + b                        dD = dhᵀ x            dx = dy W0 + dh D

`GatedUp` gates the small hidden and adds to the output of the frozen linear. With `g` the weight of each expert,
spread over its ranks and scaled, and `⟨·,·⟩ₑ` a sum over the ranks of expert e:

    u = g ⊙ h           y += u Bᵀ                            du = dy B             dB = dyᵀ u
                                                             dh = g ⊙ du           dwₑ = scaleₑ ⟨du, h⟩ₑ

What is kept for the backward pass is `x`, `h`, `w` and parameters; `u` is computed again. Nothing of size
`[T, E, out]` or `[T, E, in]` ever exists, nothing waits for the device and no shape depends on data. Between the two
lies routing, on `[T, E]`, in torch's own autograd, so every routing choice has this path.

Gradients of a gradient (`create_graph=True`) are refused rather than wrong; `MOLORA_KERNELS=reference` has them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from molora.kernels.products import add_product_, product_dtype
from molora.routing.precision import full_precision, promote


class Stack(NamedTuple):
    """What is stacked for one read of the input.

    Attributes:
        dtype: In which A is multiplied, and the hidden given.
        downs: How many of the matrices are rows of A; the others are multiplied in at least fp32.
    """

    dtype: torch.dtype
    downs: int


class _Operands(NamedTuple):
    """Products of `x` that one call computes: one where both parts have the same precision."""

    wide: Tensor
    down: Tensor
    exact: Tensor | None
    rows: Tensor | None


def _operands(x: Tensor, stack: Stack, matrices: tuple[Tensor, ...]) -> _Operands:
    """Cast and stack; `exact` and `rows` are `None` where everything is in one product."""
    exact, wide = promote(x).dtype, product_dtype(stack.dtype, x.device)
    downs, others = matrices[: stack.downs], matrices[stack.downs :]
    if exact == wide or not others:
        return _Operands(x.to(wide), _stacked(matrices, wide), None, None)
    return _Operands(x.to(wide), _stacked(downs, wide), x.to(exact), _stacked(others, exact))


def _stacked(matrices: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
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
        ctx.stack, ctx.saved_rows = stack, [matrix.shape[0] for matrix in matrices]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, *matrices)
        with full_precision(x):
            y = None if weight is None else _linear(x, weight, bias)
            wide, down, exact, rows = _operands(x.reshape(-1, x.shape[-1]), stack, matrices)
            hidden = wide @ down.T
            # Parts of one tensor: a copy of each would be as long again in memory.
            parts = list(hidden.split([m.shape[0] for m in matrices[: None if exact is None else stack.downs]], dim=1))
            if exact is not None and rows is not None:
                parts += (exact @ rows.T).split([matrix.shape[0] for matrix in matrices[stack.downs :]], dim=1)
        for place, part in enumerate(parts):
            part = part.to(stack.dtype) if place < stack.downs else part
            parts[place] = part.unflatten(0, x.shape[:-1]) if x.ndim != 2 else part
        return (y, *parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, *dparts: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of the input and of each matrix."""
        x, weight, *matrices = ctx.saved_tensors
        stack, flat = ctx.stack, x.reshape(-1, x.shape[-1])
        with full_precision(x):
            operands = _operands(flat, stack, tuple(matrices))
            parts = [_flat(part, flat.shape[0]) for part in dparts]
            dx = _of_frozen(dy, weight, x, operands.wide.dtype) if ctx.needs_input_grad[0] else None
            dmatrices: list[Tensor | None] = []
            end = len(matrices) if operands.exact is None else stack.downs
            for source, stacked, begin, stop in (
                (operands.wide, operands.down, 0, end),
                (operands.exact, operands.rows, end, len(matrices)),
            ):
                if source is None or stacked is None:
                    continue
                small = _joined(parts[begin:stop], matrices[begin:stop], source)
                if ctx.needs_input_grad[0]:
                    dx = small @ stacked if dx is None else add_product_(dx, small, stacked)
                dmatrices += _gradients(
                    small, source, matrices[begin:stop], ctx.needs_input_grad[4 + begin : 4 + stop]
                )
        return (None if dx is None else dx.to(x.dtype).view_as(x), None, None, None, *dmatrices)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The frozen linear, bit for bit as it computes by itself."""
    y = torch.nn.functional.linear(x.to(weight.dtype), weight, bias)
    # Torch lets nobody write into a view that a function returns beside other views, though nobody else has this one.
    return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y


def _flat(part: Tensor | None, tokens: int) -> Tensor | None:
    return None if part is None else part.reshape(tokens, -1)


def _of_frozen(dy: Tensor | None, weight: Tensor | None, x: Tensor, dtype: torch.dtype) -> Tensor | None:
    """What the frozen linear adds to the input's gradient, `[T, in]`, in the precision it is computed in."""
    if dy is None or weight is None:
        return None
    wide = product_dtype(weight.dtype, x.device)
    return dy.reshape(-1, dy.shape[-1]).to(wide) @ weight.to(wide)


def _joined(parts: list[Tensor | None], matrices: list[Tensor], like: Tensor) -> Tensor:
    """The gradients of the parts side by side, `[T, N]`; zeros for those that nothing used."""
    zeros = [
        like.new_zeros(like.shape[0], m.shape[0]) if p is None else p.to(like.dtype)
        for p, m in zip(parts, matrices, strict=True)
    ]
    return zeros[0] if len(zeros) == 1 else torch.cat(zeros, dim=1)


def _gradients(small: Tensor, source: Tensor, matrices: list[Tensor], needed: tuple[bool, ...]) -> list[Tensor | None]:
    if not any(needed):
        return [None] * len(matrices)
    together = (small.T @ source).split([matrix.shape[0] for matrix in matrices])
    return [d.to(m.dtype) if need else None for d, m, need in zip(together, matrices, needed, strict=True)]


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
            in_place: Write into `y`, which nobody else may need.
        """
        ctx.spread = spread
        ctx.save_for_backward(hidden, weights, up)
        with full_precision(hidden):
            if in_place:
                ctx.mark_dirty(y)
            wide = product_dtype(hidden.dtype, hidden.device)
            gated = _gated(hidden, weights, spread, wide)
            if not in_place and y.dtype == wide:
                return torch.addmm(y.reshape(-1, y.shape[-1]), gated, up.to(wide).T).view_as(y)
            result = y if in_place else y.clone()
            flat = result.view(-1, y.shape[-1])
            add_product_(flat, gated, up.to(wide).T)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the output before, the hidden, the weights and B."""
        hidden, weights, up = ctx.saved_tensors
        spread: Spread = ctx.spread
        with full_precision(hidden):
            wide = product_dtype(hidden.dtype, hidden.device)
            flat = dy.reshape(-1, dy.shape[-1]).to(wide)
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
    return gated.reshape(-1, gated.shape[-1]).to(dtype)


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
