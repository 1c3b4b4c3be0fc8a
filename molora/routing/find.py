"""Find the adapted modules of a model, several times a training step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

MARK = "routing_scope"
"""A class that has this attribute is that of an adapted module."""


def adapted_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and adapted module, as `named_modules()` gives them.

    An adapted module holds a dozen containers for each of its adapters, which are most of what `named_modules()`
    walks through; nothing in them is adapted, so only the frozen module is looked into.
    """
    yield from _within(model, "", set())


def _within(module: nn.Module, name: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    if id(module) in seen:
        return
    seen.add(id(module))
    children = module._modules
    if hasattr(type(module), MARK):
        yield name, module
        children = {key: child for key, child in children.items() if key == "base_layer"}
    for key, child in children.items():
        if child is not None and (child._modules or hasattr(type(child), MARK)):
            yield from _within(child, f"{name}.{key}" if name else key, seen)
