"""An adapted linear by the fused operation: routing, both products and the sum in a handful of kernels, on GPUs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from molora.held import plain_linear
from molora.kernels.fused import mixture
from molora.kernels.selfcheck import KERNEL_DTYPES, works
from molora.observe import hand_on
from molora.routing.precision import compute_dtype, full_precision
from molora.standard import drops, standard_of


def add_fused(
    layer: Any, name: str, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], insist: bool
) -> Tensor | None:
    """The output of an adapted linear, `[..., in]` to `[..., out]`; `None` where there is no kernel for it.

    Args:
        layer: The linear.
        name: Name of the one adapter.
        x: Its input.
        args: Further arguments of the frozen linear.
        kwargs: Likewise.
        insist: Do not ask whether the kernels work here.
    """
    if layer.molora_plan[name].gives_hidden:
        return None
    parts = standard_of(layer, name)
    if parts is None or parts.follows or drops(layer, name):
        return None
    base: Any = layer.base_layer
    dtype = compute_dtype(x, parts.up.dtype)
    if dtype not in KERNEL_DTYPES or not (insist or works(x.device, dtype)):
        return None
    fuse = not args and not kwargs and plain_linear(base)
    if fuse and not base.weight.dtype == dtype == (dtype if base.bias is None else base.bias.dtype):
        return None
    flat = x.to(dtype).reshape(x.shape[:-1].numel(), x.shape[-1])
    if fuse:
        with torch.no_grad(), full_precision(x):
            frozen = y = F.linear(flat, base.weight, base.bias)
    else:
        frozen = base(x, *args, **kwargs)
        y = frozen.reshape(len(flat), frozen.shape[-1])
        y = y.clone() if y.dtype == dtype else y.to(dtype)  # it may belong to somebody, as a quantised linear's
    router, threshold = parts.router, parts.threshold
    result = mixture(
        flat,
        y,
        parts.down.to(dtype),
        _exact(router.rows(), dtype),
        parts.up.to(dtype),
        router.offset(),
        None if threshold is None else _exact(threshold.rows(), dtype),
        None if threshold is None else threshold.offset(),
        None if parts.bias is None else parts.bias(),
        scale=parts.scale,
        choices=parts.choices,
        base_weight=base.weight if fuse else None,
        backend="triton",
    )
    threshold_logit = result.threshold_logit if result.threshold_logit.numel() else None
    hand_on(layer, name, x, result.logits, result.weights, threshold_logit)
    return result.y.view(*x.shape[:-1], result.y.shape[1]).to(frozen.dtype)


def _exact(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of a router in a dtype that the kernels take."""
    return rows if rows.dtype in (dtype, torch.float32) else rows.float()
