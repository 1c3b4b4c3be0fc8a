"""The Triton kernels of one mixture, put together: the same functions as `molora.kernels.mixture`, on a GPU.

Importing this needs Triton. With TRITON_INTERPRET=1 set before the import, everything runs on CPU tensors, slowly.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from molora.kernels.choices import Choices
from molora.kernels.mixture import Forward, Gradients, Needs, Saved
from molora.kernels.triton.expand_add import launch_expand_add
from molora.kernels.triton.hidden_backward import launch_hidden_backward
from molora.kernels.triton.route_shrink import launch_route_shrink
from molora.kernels.triton.weight_gradient import launch_down_gradient, launch_up_gradient

__all__ = ["mixture_backward", "mixture_forward"]


def mixture_forward(
    x: Tensor,
    y: Tensor,
    a: Tensor,
    router: Tensor,
    b: Tensor,
    router_bias: Tensor | None,
    threshold_row: Tensor | None,
    threshold_bias: Tensor | None,
    balance_bias: Tensor | None,
    scale: float,
    choices: Choices,
    in_place: bool,
) -> Forward:
    """Add a mixture to y in two launches; see `molora.kernels.mixture.mixture_forward`."""
    with _device_of(x):
        x, a, router, b = (tensor.contiguous() for tensor in (x, a, router, b))
        threshold_row = None if threshold_row is None else threshold_row.contiguous()
        h, logits, threshold_logit, weights = launch_route_shrink(
            x, a, router, router_bias, threshold_row, threshold_bias, balance_bias, choices
        )
        base = y.contiguous()
        out = base if in_place else torch.empty_like(base)
        launch_expand_add(base, out, h, weights, b, scale)
        if in_place and base is not y:
            out = y.copy_(base)
        return Forward(out, h, logits, threshold_logit, weights)


def mixture_backward(
    saved: Saved,
    gy: Tensor,
    dlogits: Tensor | None,
    dthreshold: Tensor | None,
    dweights: Tensor | None,
    scale: float,
    choices: Choices,
    needs: Needs = Needs(),  # noqa: B008  # immutable
) -> Gradients:
    """Differentiate `mixture_forward`; see `molora.kernels.mixture.mixture_backward`.

    One launch for the hidden and the gate (two for many ranks), one each for the weight gradients on either side.
    """
    with _device_of(gy):
        x, gy, (bank, ranks) = saved.x.contiguous(), gy.contiguous(), (saved.weights.shape[1], saved.a.shape[0])
        aux = _fp32(dlogits), _fp32(dthreshold), _fp32(dweights)
        routed = (saved.logits, saved.threshold_logit, saved.weights)
        packed, exact = launch_hidden_backward(gy, saved.b.contiguous(), saved.h, *routed, aux, scale, choices)
        dx = _input_gradient(saved, gy, packed) if needs.x else None
        da = drouter = bias = db = None
        if needs.a or needs.router:
            down = launch_down_gradient(packed, exact if needs.router else None, x, ranks, bank)
            da = down[:ranks].to(saved.a.dtype) if needs.a else None
            drouter = down[ranks:] if needs.router else None
        if needs.router:
            bias = exact.sum(dim=0)
        if needs.b:
            db = launch_up_gradient(saved.h, saved.weights, gy, scale).to(saved.b.dtype)
        return Gradients(dx, da, drouter, bias, db)


def _input_gradient(saved: Saved, gy: Tensor, packed: Tensor) -> Tensor:
    """Gradient of x `[T, in]`: through the base weight, if given, plus one product with `[A; W; v; 0]`."""
    parts = [saved.a, saved.router.to(packed.dtype)]
    if saved.threshold_row is not None:
        parts.append(saved.threshold_row.to(packed.dtype))
    if missing := packed.shape[1] - sum(len(part) for part in parts):
        parts.append(packed.new_zeros(missing, saved.a.shape[1]))
    stacked = torch.cat(parts)
    return packed @ stacked if saved.base_weight is None else (gy @ saved.base_weight).addmm_(packed, stacked)


def _fp32(given: Tensor | None) -> Tensor | None:
    return None if given is None else given.float().contiguous()


def _device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)
