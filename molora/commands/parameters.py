"""Count parameters by what they are for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from torch import Tensor

KINDS = {"A": "experts, A", "B": "experts, B", "router": "routers", "threshold": "threshold nets"}


def kind_of(name: str) -> str:
    """What a trainable parameter is for, by its checkpoint name."""
    match = re.search(r"\.molora_([^.]+)\.", name)
    return KINDS.get(match[1], match[1]) if match else "fully trained modules"


def count_by_kind(parameters: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
    """Number of values by kind, in the order of `KINDS`."""
    counts: Counter[str] = Counter()
    for name, parameter in parameters:
        counts[kind_of(name)] += parameter.numel()
    order = [*KINDS.values(), *counts]
    return {kind: counts[kind] for kind in dict.fromkeys(order) if kind in counts}
