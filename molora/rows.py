"""A batch whose rows use different adapters: their products one by one, everything else at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from molora.held import plain_linear
from molora.kernels.adapter_parts import AdapterParts
from molora.kernels.choices import Choices
from molora.kernels.multi_adapter import mixed_rows
from molora.kernels.selfcheck import works
from molora.routing.precision import autocast_enabled
from molora.standard import drops, standard_of


def _parts(layer: Any, name: str, dtype: torch.dtype) -> tuple[Choices, AdapterParts] | None:
    """What an adapter has on a module, if the common form knows it."""
    parts = standard_of(layer, name)
    if parts is None or parts.bias is not None or name in layer.molora_group:
        return None
    if {parts.down.dtype, parts.up.dtype} != {dtype} or drops(layer, name):
        return None
    net = parts.threshold
    threshold = (None, None) if net is None else (net.rows(), net.offset())
    router = parts.router
    return parts.choices, AdapterParts(parts.down, router.rows(), parts.up, parts.scale, router.offset(), *threshold)


def _kind(choices: Choices, parts: AdapterParts) -> tuple[Any, ...]:
    """What adapters must have in common to be multiplied together: everything but values and scales."""
    return choices, *((part.shape, part.dtype) if isinstance(part, Tensor) else part is None for part in parts)


def add_rows(
    layer: Any, x: Tensor, adapter_names: list[str], base: Callable[[Tensor], Tensor], kernels: str
) -> Tensor | None:
    """The output of an adapted linear, each row by its own adapter, or `None` if the adapters have no common form.

    Args:
        layer: The linear, `MoLoraLinear`.
        x: Its input, `[B, S, in]`.
        adapter_names: For each row the adapter; those that the linear does not have add nothing.
        base: The frozen linear.
        kernels: What `MOLORA_KERNELS` asks for.
    """
    if torch.is_grad_enabled() or x.ndim != 3 or autocast_enabled(x) or layer.routing_recorder is not None:
        return None
    known = [name for name in dict.fromkeys(adapter_names) if layer.has_adapter(name)]
    found = [_parts(layer, name, x.dtype) for name in known]
    if not found or any(one is None for one in found):
        return None
    kinds = {_kind(*one) for one in found if one is not None}
    if len(kinds) > 1:
        return None
    places = {name: place for place, name in enumerate(known)}
    frozen = base(x)
    y = frozen.to(x.dtype)
    y = y if plain_linear(layer.base_layer) and y.is_contiguous() else y.clone()
    adapters = [one[1] for one in found if one is not None]
    index, chosen = [places.get(name, -1) for name in adapter_names], kernels
    if kernels == "auto":
        chosen = "triton" if x.is_cuda and works(x.device, x.dtype) else "torch"
    return mixed_rows(x, y, index, adapters, next(iter(kinds))[0], chosen).to(frozen.dtype)
