"""See what the experts of each adapted linear read, and what they hand to B, while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor


class Seen(NamedTuple):
    """One pass of one adapter of one linear.

    Attributes:
        x: What the experts read, `[..., in]`.
        gated: What B is multiplied with, `[..., C]`; with `num_splits` `[..., splits, C]`.
        weights: Mixing weights, shaped to broadcast against the tokens, shared experts last; `None` for one each.
    """

    x: Tensor
    gated: Tensor
    weights: Tensor | None


Watcher = Callable[[Any, str, Seen], None]
"""Called with the layer, the adapter's name and what was seen."""


@contextmanager
def watching(layers: Iterable[Any], watcher: Watcher) -> Iterator[None]:
    """Have layers call `watcher` in each forward pass inside the block; they take the plain way meanwhile."""
    watched = [(layer, layer.watcher) for layer in layers]
    for layer, _ in watched:
        layer.watcher = watcher
    try:
        yield
    finally:
        for layer, before in watched:
            layer.watcher = before
