"""The fused mixture as one operation: an `autograd.Function` in eager mode, `torch.ops.molora.mixture` in a graph.

Both run the same two functions, `mixture_forward` and `mixture_backward`: those of `molora.kernels.triton` on a GPU,
those of `molora.kernels.mixture` elsewhere. The function writes into y; the operation gives a new tensor, as
compilers want. They save for the backward pass x, the hidden `[T, R]`, logits, weights, threshold logit and
parameters, nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

from molora.errors import MoloraError, one_of
from molora.kernels import mixture as plain
from molora.kernels.choices import Choices, check_call
from molora.kernels.mixture import Forward, Gradients, Needs, Saved

BACKENDS = ("triton", "torch")


class Mixture(NamedTuple):
    """What the fused operation gives. All but y are in fp32, and every tensor may get a gradient.

    Attributes:
        y: `[T, out]`.
        logits: `[T, E]`.
        threshold_logit: `[T, 1]`, or empty without a learned threshold.
        weights: `[T, ALL]`; not zero exactly where an expert was selected, and 1 for shared ones.
    """

    y: Tensor
    logits: Tensor
    threshold_logit: Tensor
    weights: Tensor


def mixture(
    x: Tensor,
    y: Tensor,
    a: Tensor,
    router: Tensor,
    b: Tensor,
    router_bias: Tensor | None = None,
    threshold_row: Tensor | None = None,
    threshold_bias: Tensor | None = None,
    balance_bias: Tensor | None = None,
    *,
    scale: float,
    choices: Choices,
    base_weight: Tensor | None = None,
    backend: str | None = None,
) -> Mixture:
    """Route the tokens and add `b (scale · gate ⊙ (a x))` to y, in place unless a graph is being compiled.

    Go on with the y that is returned: only it knows its gradient if the given one is a view.

    Args:
        x: `[T, in]`, in fp32, bf16 or fp16 (fp64 too without a GPU).
        y: `[T, out]`, in x's dtype.
        a: `[R, in]`, in x's dtype; as many rows for each expert, those of shared ones last.
        router: `[E, in]`, in x's dtype or fp32.
        b: `[out, R]`, in x's dtype.
        router_bias: `[E]`, added to the logits.
        threshold_row: `[1, in]`, the threshold net of `adaptive_threshold`, in x's dtype or fp32.
        threshold_bias: `[1]`, its bias.
        balance_bias: `[E]`, added to the probabilities when experts are ranked. Gets no gradient.
        scale: Factor of every expert.
        choices: How logits become weights.
        base_weight: `[out, in]`, frozen: y was computed from x with it, outside the graph. The gradient of x then goes
            through it, and y gets none.
        backend: `"triton"` or `"torch"`. By default Triton on a GPU.

    Raises:
        MoloraError: If shapes, dtypes or choices do not fit together.
    """
    if backend is None:
        backend = "triton" if x.is_cuda else "torch"
    elif backend not in BACKENDS:
        raise MoloraError(f"backend of the fused operation: {one_of(backend, BACKENDS)}")
    tensors = {
        "x": x, "y": y, "a": a, "router": router, "b": b, "router_bias": router_bias, "threshold_row": threshold_row,
        "threshold_bias": threshold_bias, "balance_bias": balance_bias, "base_weight": base_weight,
    }  # fmt: skip
    check_call(tensors, choices, backend)
    if torch.compiler.is_compiling():
        return Mixture(*torch.ops.molora.mixture(*tensors.values(), *_flat(scale, choices, backend))[:4])
    return Mixture(*_Mixture.apply(*tensors.values(), scale, choices, backend))


class _Mixture(torch.autograd.Function):
    """The eager form. Writes into y."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, ...]:
        tensors, base_weight, (scale, choices, backend) = given[:9], given[9], given[10:]
        x, y, a, router, b, router_bias, threshold_row, threshold_bias, _ = tensors
        if y._is_view():
            # Autograd lets only functions of one output write into a view, such as rows flattened into tokens. So y'
            # shares its memory with y without being it; who saved y for a backward pass is still told that it changed.
            out = _forward((x, y.detach(), *tensors[2:]), scale, choices, backend, in_place=True)
            increment_version(y)
        else:
            out = _forward(tensors, scale, choices, backend, in_place=True)
            ctx.mark_dirty(y)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, a, router, b, threshold_row, base_weight, *out[1:])
        ctx.static = (scale, choices, backend)
        ctx.dtypes = _Dtypes.of(router_bias, threshold_bias)
        return out.y, out.logits, out.threshold_logit, out.weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, needs = Saved(*ctx.saved_tensors), _needs(ctx.needs_input_grad)
        scale, choices, backend = ctx.static
        found = Gradients(None, None, None, None, None)
        if any(needs):
            found = _backward(saved, grads, scale, choices, backend, needs)
        dy = grads[0] if saved.base_weight is None else None
        return *_by_input(found, dy, saved, ctx.dtypes), None, None, None, None, None


class _Dtypes(NamedTuple):
    """Of the biases, which the backward pass does not read."""

    router: torch.dtype | None
    threshold: torch.dtype | None

    @classmethod
    def of(cls, router_bias: Tensor | None, threshold_bias: Tensor | None) -> _Dtypes:
        return cls(*(None if bias is None else bias.dtype for bias in (router_bias, threshold_bias)))


_CHOICES = (
    "float scale, str gate, str selection, bool minus_threshold, bool renormalize, float temperature, int top_k, "
    "float top_p, float threshold, float max_threshold, int shared_experts, str backend"
)
"""The static arguments of the operations, which take no objects: scale, the fields of `Choices`, backend."""


_FIELDS = tuple(field.name for field in dataclasses.fields(Choices))


def _flat(scale: float, choices: Choices, backend: str) -> tuple[Any, ...]:
    return (scale, *(getattr(choices, name) for name in _FIELDS), backend)


def _static(flat: tuple[Any, ...]) -> tuple[float, Choices, str]:
    return flat[0], Choices(*flat[1:-1]), flat[-1]


@torch.library.custom_op(
    "molora::mixture",
    mutates_args=(),
    schema="(Tensor x, Tensor y, Tensor a, Tensor router, Tensor b, Tensor? router_bias, Tensor? threshold_row, "
    f"Tensor? threshold_bias, Tensor? balance_bias, Tensor? base_weight, {_CHOICES}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _operation(*given: Any) -> tuple[Tensor, ...]:
    """The form in graphs: a new y', logits, threshold logit, weights, and the hidden for the backward pass."""
    out = _forward(given[:9], *_static(given[10:]), in_place=False)
    return out.y, out.logits, out.threshold_logit, out.weights, out.h


@_operation.register_fake
def _(*given: Any) -> tuple[Tensor, ...]:
    x, y, a, router, _, _, threshold_row = given[:7]
    exact = torch.promote_types(x.dtype, torch.float32)
    logits = x.new_empty(x.shape[0], router.shape[0], dtype=exact)
    threshold_logit = logits.new_empty(*((0,) if threshold_row is None else (x.shape[0], 1)))
    weights = logits.new_empty(x.shape[0], _static(given[10:])[1].bank(router.shape[0]))
    return y.new_empty(y.shape), logits, threshold_logit, weights, x.new_empty(x.shape[0], a.shape[0])


@torch.library.custom_op(
    "molora::mixture_backward",
    mutates_args=(),
    schema="(Tensor? gy, Tensor? dlogits, Tensor? dthreshold, Tensor? dweights, Tensor x, Tensor a, Tensor router, "
    "Tensor b, Tensor? threshold_row, Tensor? base_weight, Tensor h, Tensor logits, Tensor threshold_logit, "
    f"Tensor weights, bool[] needs, {_CHOICES}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _operation_backward(*given: Any) -> tuple[Tensor, ...]:
    """Gradients as in `Gradients`; one that is not needed is empty, as operations cannot give `None`."""
    saved = Saved(*given[4:14])
    found = _backward(saved, given[:4], *_static(given[15:]), Needs(*given[14]))
    empty = [saved.x.new_empty(0) if grad is None else grad for grad in found]
    if found.a is not None and found.router is not None:
        empty[2] = found.router.clone()  # may share its storage with the gradient of A
    return tuple(empty)


@_operation_backward.register_fake
def _(*given: Any) -> tuple[Tensor, ...]:
    saved, needs = Saved(*given[4:14]), Needs(*given[14])
    rows = saved.router.shape[0] + (saved.threshold_row is not None)
    return (
        saved.x.new_empty(saved.x.shape if needs.x else (0,)),
        saved.a.new_empty(saved.a.shape if needs.a else (0,), dtype=saved.a.dtype if needs.a else saved.x.dtype),
        saved.logits.new_empty((rows, saved.x.shape[1])) if needs.router else saved.x.new_empty(0),
        saved.logits.new_empty((rows,)) if needs.router else saved.x.new_empty(0),
        saved.b.new_empty(saved.b.shape if needs.b else (0,)),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, a, router, b, router_bias, threshold_row, threshold_bias, _, base_weight = inputs[:10]
    _, logits, threshold_logit, weights, h = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(h)
    ctx.save_for_backward(x, a, router, b, threshold_row, base_weight, h, logits, threshold_logit, weights)
    ctx.static, ctx.dtypes = inputs[10:], _Dtypes.of(router_bias, threshold_bias)


def _differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    saved, needs = Saved(*ctx.saved_tensors), _needs(ctx.needs_input_grad)
    found = torch.ops.molora.mixture_backward(*grads[:4], *saved, list(needs), *ctx.static)
    kept = (needs.x, needs.a, needs.router, needs.router, needs.b)
    gradients = Gradients(*(grad if needed else None for grad, needed in zip(found, kept, strict=True)))
    dy = grads[0] if saved.base_weight is None else None
    return *_by_input(gradients, dy, saved, ctx.dtypes), *(None for _ in range(2 + len(ctx.static)))


_operation.register_autograd(_differentiate, setup_context=_setup)


def _forward(tensors: tuple[Any, ...], scale: float, choices: Choices, backend: str, in_place: bool) -> Forward:
    with _own_precision(tensors[0]):
        return _functions(backend, tensors[0]).mixture_forward(*tensors, scale, choices, in_place)


def _backward(
    saved: Saved, grads: Sequence[Tensor | None], scale: float, choices: Choices, backend: str, needs: Needs
) -> Gradients:
    """Gradients, when only auxiliary losses send one too."""
    x, (gy, dlogits, dthreshold, dweights) = saved.x, grads
    gy = x.new_zeros(x.shape[0], saved.b.shape[0]) if gy is None else gy.to(x.dtype)
    with _own_precision(x):
        return _functions(backend, x).mixture_backward(saved, gy, dlogits, dthreshold, dweights, scale, choices, needs)


def _needs(of_input: tuple[bool, ...]) -> Needs:
    x, _, a, router, b, router_bias, threshold_row, threshold_bias = of_input[:8]
    return Needs(x, a, router or router_bias or threshold_row or threshold_bias, b)


def _by_input(found: Gradients, dy: Tensor | None, saved: Saved, dtypes: _Dtypes) -> tuple[Tensor | None, ...]:
    """Gradients in the order of the tensors from x to the threshold's bias."""
    experts = saved.router.shape[0]
    router = router_bias = row = bias = None
    if found.router is not None and found.bias is not None:
        router = found.router[:experts].to(saved.router.dtype)
        router_bias = None if dtypes.router is None else found.bias[:experts].to(dtypes.router)
        if saved.threshold_row is not None:
            row = found.router[experts:].to(saved.threshold_row.dtype)
            bias = None if dtypes.threshold is None else found.bias[experts:].to(dtypes.threshold)
    return found.x, dy, found.a, router, found.b, router_bias, row, bias


def _functions(backend: str, x: Tensor) -> Any:
    """The module that has both functions."""
    if backend == "torch" or not x.shape[0]:  # a launch without programs is an error
        return plain
    from molora.kernels import triton as fast  # not everywhere is Triton installed

    return fast


def _own_precision(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Autocast would round what is fp32 on purpose."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()
