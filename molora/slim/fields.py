"""The fields of a config that follow from the ranks of every module's experts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from molora.config import MoLoraConfig
from molora.imported import expert_at

Ranks = Mapping[str, tuple[int, ...]]
"""The rank of each expert, by the full name of the module."""


def rank_fields(
    config: MoLoraConfig, ranks: Ranks, plain: Collection[str], changed: Mapping[str, Any]
) -> dict[str, Any]:
    """The fields that give every module these ranks: `r`, `rank_pattern` and `imported_experts`.

    The most common ranks are `r`, those of other modules are named one by one.

    Args:
        config: The config the ranks are new for.
        ranks: Ranks of all experts of all adapted modules.
        plain: Modules with a plain LoRA beside the mixture, whose rank is `r` too.
        changed: Fields that change with them.
    """
    imported = changed.get("imported_experts", config.imported_experts) or []
    known = len(imported)
    fields: dict[str, Any] = {}
    if known:
        fields["imported_experts"] = [
            _at_ranks(one, {module: own[index] for module, own in ranks.items()}) for index, one in enumerate(imported)
        ]
    values = {module: _value(own, known) for module, own in ranks.items()}
    wanted = {module: value for module, value in values.items() if value is not None}
    number = changed.get("num_experts", config.num_experts)
    r = _most_common(
        wanted, config.r, None if plain or not isinstance(number, int) else number + config.shared_experts
    )
    others = sorted((module for module, value in wanted.items() if value != r), key=_longest_first)
    # Longer names first: a key also matches modules whose name ends with it.
    return {**fields, "r": r, "rank_pattern": {re.escape(module): wanted[module] for module in others}}


def _longest_first(name: str) -> tuple[int, str]:
    return -len(name), name


def _value(ranks: tuple[int, ...], known: int) -> int | list[int] | None:
    """`r` of one module: a number if all ranks are equal, `None` if it matters to no expert."""
    own = ranks[known:]
    if not own:
        return None
    return own[0] if len(set(own)) == 1 and own[0] else list(ranks)


def _most_common(wanted: Mapping[str, int | list[int]], r: int | list[int], length: int | None) -> int | list[int]:
    """`r` of the config: the value of most modules, as it was if that is as good.

    Args:
        wanted: The value of each module.
        r: What it was.
        length: Of a list; `None` if it has to be a number.
    """
    numbers: list[int | tuple[int, ...]] = [value for value in wanted.values() if isinstance(value, int)]
    lists = [tuple(value) for value in wanted.values() if isinstance(value, list) and all(value)]
    counts = Counter(numbers + [value for value in lists if len(value) == length])
    before = r if isinstance(r, int) else tuple(r)
    usable = isinstance(before, int) or len(before) == length
    if usable and counts[before] == max(counts.values(), default=0):
        return r
    if not counts:  # in a config of its own every module is named
        return max(rank for value in wanted.values() for rank in (value if isinstance(value, list) else [value]))
    most = max(counts, key=lambda value: counts[value])
    return most if isinstance(most, int) else list(most)


def _at_ranks(description: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, Any]:
    """The description of an imported expert that has these ranks."""
    targets = [module for module in description["target_modules"] if ranks.get(module)]
    differing = [module for module in targets if expert_at(description, module)[0] != ranks[module]]
    named = {re.escape(module): ranks[module] for module in sorted(differing, key=_longest_first)}
    old = {key: value for key, value in description["rank_pattern"].items() if key not in named}
    return {**description, "target_modules": targets, "rank_pattern": {**named, **old}}
