"""Count parameters by what they are for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from torch import Tensor

_PREFIX = "base_model.model."

KINDS = {
    "A": "experts, A",
    "B": "experts, B",
    "frozen_A": "frozen experts, A",
    "frozen_B": "frozen experts, B",
    "pool": "pools of shards",
    "router": "routers",
    "threshold": "threshold nets",
    "blend": "blends of router and scores",
    "bias": "balancing biases",
    "statistics": "statistics of what routers read",
}
"""Containers of `MoLoraLayer`, without their `molora_`, and what their parameters are; and one for constants."""

STATISTICS = (".input_mean", ".input_std")
"""Ends of the names of what `router_norm` normalises by."""


def kind_of(name: str) -> str:
    """What a trainable parameter is for, by its checkpoint name."""
    match = re.search(r"\.molora_([^.]+)\.", name)
    if name.endswith(STATISTICS):
        return KINDS["statistics"]
    return KINDS.get(match[1], match[1]) if match else "fully trained modules"


def count_by_kind(parameters: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
    """Number of values by kind, in the order of `KINDS`."""
    counts: Counter[str] = Counter()
    for name, parameter in parameters:
        counts[kind_of(name)] += parameter.numel()
    order = [*KINDS.values(), *counts]
    return {kind: counts[kind] for kind in dict.fromkeys(order) if kind in counts}


def module_kind(name: str) -> str:
    """What modules like this one are called: the last part of the full name, with `*` for the index of a layer."""
    parts = name.removeprefix(_PREFIX).split(".")
    last = next(index for index in range(len(parts) - 1, -1, -1) if not parts[index].isdecimal() or not index)
    return ".".join([parts[last], *("*" for _ in parts[last + 1 :])])
