"""What of an adapter's routing has a part for each expert, changed when experts go or become one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from molora.routing.routers import ROUTERS, Router, RouterSize
from molora.slim.adapter import PREFIX, Adapter

Remap = Callable[[str, str, Tensor, int], Tensor]
"""From the module that holds it, a name (`weight`, `bias`, `noise` or `balance`), the old values and the dimension of
the logits to the new values."""


def rerouted(adapter: Adapter, remap: Remap) -> dict[str, Tensor]:
    """The adapter's tensors with other logits.

    Args:
        adapter: The adapter.
        remap: Gives new values for all that has a part for each logit: E experts, and null experts behind them.
    """
    tensors = dict(adapter.tensors)
    for module in adapter.modules:
        router = router_of(adapter, module)
        if router is not None:
            for name, (value, dim) in router.by_expert().items():
                new = remap(module, name, value, dim)
                # A table's splits are a dimension of their own only here.
                stored = getattr(router, name)
                new = new.flatten(stored.ndim - 1) if new.ndim > stored.ndim else new
                tensors[f"{PREFIX}{module}.molora_router.{name}"] = new.to(stored.dtype).contiguous()
        balance = adapter.tensor(module, "molora_bias.weight")
        if balance is not None:
            new = remap(module, "balance", balance, 0).to(balance.dtype)
            tensors[f"{PREFIX}{module}.molora_bias.weight"] = new.contiguous()
    return tensors


def router_of(adapter: Adapter, module: str) -> Router | None:
    """The router that a module holds, or `None` if it holds none with tensors."""
    kind, state = ROUTERS[adapter.plan(module).router], adapter.part(module, "molora_router")
    if kind is None or not state:
        return None
    size = RouterSize(1, 1, 1, num_splits=adapter.config.num_splits, norm=adapter.config.router_norm)
    router: Any = kind(size)
    buffers = dict(router.named_buffers())
    for name, value in state.items():
        setattr(router, name, value if name in buffers else nn.Parameter(value, requires_grad=False))
    assert isinstance(router, Router)
    return router
