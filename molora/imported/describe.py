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
from collections.abc import Iterator, Mapping
from typing import Any

from molora.errors import did_you_mean

_KEYS: dict[str, tuple[tuple[type, ...], str]] = {
    "name": ((str,), "text"),
    "r": ((int,), "a whole number of at least 1"),
    "lora_alpha": ((int, float), "a number"),
    "use_rslora": ((bool,), "true or false"),
    "rank_pattern": ((dict,), "a mapping of module names to whole numbers"),
    "alpha_pattern": ((dict,), "a mapping of module names to numbers"),
    "target_modules": ((list,), "a list of full module names"),
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
        if re.match(rf"(.*\.)?({key})$", module_name):
            return value
    return default


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
        for key, (kinds, words) in _KEYS.items():
            value: Any = description.get(key)
            is_kind = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
            if not is_kind or (key == "r" and value < 1):
                yield f"entry {index}: `{key}` is {value!r}; must be {words}."
