"""Which published method an adapter's choices are, and what its preset says about it."""

from __future__ import annotations

import inspect
import re
from typing import Any

from molora.config import MoLoraConfig
from molora.presets import METHODS, PRESETS

_ALSO_CHOSEN = frozenset(
    [
        *("r", "num_experts", "shared_experts", "frozen_experts", "lora_alpha", "lora_dropout", "use_rslora"),
        *(
            "imported_experts",
            "target_modules",
            "exclude_modules",
            "ffn_modules",
            "depth_range",
            "layers_to_transform",
        ),
        *("layers_pattern", "rank_pattern", "alpha_pattern", "router_dim", "router_init_range", "router_lr_ratio"),
        *("calibration_rows", "num_tasks", "top_k", "top_p", "threshold", "max_threshold", "experts_per_token"),
        *("routing_losses", "bias", "fan_in_fan_out", "modules_to_save", "trainable_token_indices", "task_type"),
        *("init_weights", "init_A", "init_A_range", "num_shards", "pool_rank", "private_rank"),
        *("temperature", "min_logit"),
    ]
)
"""Fields that a user sets for a method to be his own size of it, rather than another method."""

_COMPOSED = METHODS["composed from trained LoRAs"]
_PAPER = re.compile(r"arXiv (\d{4}\.\d{4,5})")


def preset_of(config: MoLoraConfig) -> str | None:
    """The preset whose routing choices a config has; `None` if there is none, or more than one."""
    own = _choices(config)
    found = [name for name in PRESETS if _choices_of(name) == own]
    with_depth, imported = isinstance(config.num_experts, list), config.imported_experts is not None
    alike = [name for name in found if isinstance(PRESETS[name]().get("num_experts"), list) == with_depth]
    alike = [name for name in alike or found if (name in _COMPOSED) == imported] or alike or found
    return alike[0] if len(alike) == 1 else None


def described(preset: str) -> tuple[str, str | None]:
    """What a preset is in words with its equation, and the arXiv number of its paper if it has one."""
    text = inspect.getdoc(PRESETS[preset]) or ""
    first, _, rest = text.partition("\n\n")
    equation = rest.split("\n\n")[0]
    paper = None if "From no paper" in text else _PAPER.search(equation) or _PAPER.search(text)
    return f"{_line(first)}\n\n{_line(equation)}".strip(), paper[1] if paper else None


def _choices(config: MoLoraConfig) -> dict[str, Any]:
    fields = (entry.name for entry in MoLoraConfig.user_fields())
    return _sized({name: getattr(config, name) for name in fields if name not in _ALSO_CHOSEN})


def _choices_of(preset: str) -> dict[str, Any]:
    """A preset's choices over the defaults, without the checks that a whole config would need."""
    fields = {entry.name: entry for entry in MoLoraConfig.user_fields()}
    given = PRESETS[preset]()
    return _sized(
        {
            name: given[name] if name in given else _default(entry)
            for name, entry in fields.items()
            if name not in _ALSO_CHOSEN
        }
    )


def _sized(choices: dict[str, Any]) -> dict[str, Any]:
    """Choices in which the number of splits counts as whether there are some."""
    return {**choices, "num_splits": choices["num_splits"] > 1}


def _default(entry: object) -> Any:
    factory = getattr(entry, "default_factory", None)
    return factory() if callable(factory) else getattr(entry, "default", None)


def _line(text: str) -> str:
    return " ".join(text.split())
