"""What a config remembers of an imported expert, and what follows from it: its rank and scale at any module.

One description an expert, plain JSON:

| key | meaning |
|---|---|
| `name` | name of the adapter it came from |
| `r`, `lora_alpha`, `use_rslora` | as in PEFT's `LoraConfig` |
| `rank_pattern`, `alpha_pattern` | module name or regular expression to the value used there, matched as PEFT does |
| `target_modules` | full names of the modules it adapts; anywhere else its rank is 0 |
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from molora.errors import did_you_mean


def _is_number(value: Any) -> bool:
    # Python's whole numbers may be larger than any float.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and _is_number(value) and value >= 1


def _is_pattern(value: Any, is_usable: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(_is_expression(key) and is_usable(entry) for key, entry in value.items())


def _is_expression(key: Any) -> bool:
    try:
        re.compile(_ending(key))
    except (re.error, OverflowError, RecursionError):
        return False
    return isinstance(key, str)


_KEYS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "name": (lambda value: isinstance(value, str), "text"),
    "r": (_is_rank, "a whole number of at least 1"),
    "lora_alpha": (_is_number, "a finite number"),
    "use_rslora": (lambda value: isinstance(value, bool), "true or false"),
    "rank_pattern": (
        lambda value: _is_pattern(value, _is_rank),
        "a mapping of module names or regular expressions to whole numbers of at least 1",
    ),
    "alpha_pattern": (
        lambda value: _is_pattern(value, _is_number),
        "a mapping of module names or regular expressions to finite numbers",
    ),
    "target_modules": (
        lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
        "a list of full module names",
    ),
}


def expert_at(description: Mapping[str, Any], module_name: str) -> tuple[int, float]:
    """Return rank and scale of an imported expert at one module.

    Args:
        description: As in the table above.
        module_name: Full name of the module in the base model.

    Returns:
        `(0, 0.0)` where the expert adapts nothing.
    """
    if module_name not in description["target_modules"]:
        return 0, 0.0
    r = by_pattern(description["rank_pattern"], module_name, description["r"])
    lora_alpha = by_pattern(description["alpha_pattern"], module_name, description["lora_alpha"])
    return r, lora_alpha / (math.sqrt(r) if description["use_rslora"] else r)


def by_pattern(pattern: Mapping[str, Any], module_name: str, default: Any) -> Any:
    """Return the first value whose key is the module's name, its ending, or a regular expression for it, as PEFT."""
    for key, value in pattern.items():
        if re.match(_ending(key), module_name):
            return value
    return default


def _ending(key: str) -> str:
    return rf"(.*\.)?({key})$"


def mistakes_of_values(description: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the key of each value of a description that cannot be, and what it must be."""
    for key, (is_usable, words) in _KEYS.items():
        if not is_usable(description.get(key)):
            yield key, words


def description_mistakes(descriptions: Any) -> Iterator[str]:
    """Yield one sentence for each thing that is wrong with a list of descriptions; nothing if it is usable."""
    if not isinstance(descriptions, list) or not descriptions:
        yield f"got {descriptions!r}; must be a list of descriptions, as `MoLoraConfig.from_adapters` writes it."
        return
    for index, description in enumerate(descriptions):
        if not isinstance(description, dict):
            yield f"entry {index} is {description!r}; must be a mapping of {', '.join(_KEYS)}."
            continue
        for key in description.keys() - _KEYS.keys():
            yield f"entry {index} has an unknown key {key!r}.{did_you_mean(key, _KEYS)}"
        for key, words in mistakes_of_values(description):
            yield f"entry {index}: `{key}` is {description.get(key)!r}; must be {words}."
