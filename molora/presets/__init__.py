"""Presets: methods as a few config fields, one file each. The function's docstring says what the method is.

A preset only returns field values; anything else in `MoLoraConfig` keeps its default, and any field may be overridden
in `MoLoraConfig.from_preset(name, **overrides)`. A new method is one file here and its name in `METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from molora.errors import ConfigError, Problem, one_of
from molora.routing import SELECTIONS_OF_FIELD

METHODS: dict[str, tuple[str, ...]] = {
    "our own": ("recommended",),
    "routed by token, whole LoRAs": (
        "adamole",
        "mole",
        "loramoe",
        "mixlora",
        "mixlora-dynamic",
        "mola",
        "sira",
        "molora",
        "hydralora",
        "adamoe",
        "perft",
        "pmoe",
    ),
    "by rank": (
        "smora",
        "flylora",
        "mor1e",
        "mor1e-pairs",
        "mora-cl",
        "aoe",
        "hmoe",
        "mos",
    ),
    "routed by sequence or task": (
        "moelora",
        "mocle",
        "becotta",
        "polytropon",
        "polytropon-mhr",
        "smear",
    ),
    "composed from trained LoRAs": (
        "x-lora",
        "arrow",
        "phatgoose",
        "phatgoose-gate",
        "glider",
        "self-moe",
        "lora-bank",
        "lorahub",
        "psec",
        "selma",
    ),
    "baselines": (
        "static",
        "lora",
    ),
}
"""Names by kind. `x-lora` is the function `x_lora` in the file `x_lora.py`."""


def _function(name: str) -> Callable[[], dict[str, Any]]:
    module = name.replace("-", "_")
    function: Callable[[], dict[str, Any]] = getattr(import_module(f"{__name__}.{module}"), module)
    return function


PRESETS: dict[str, Callable[[], dict[str, Any]]] = {
    name: _function(name) for names in METHODS.values() for name in names
}

_OF_ANY_SELECTION = ("probability", "probability_minus_threshold")
"""Weights that `MoLoraConfig` chooses by the selection; the others are part of a method."""


def available_presets() -> list[str]:
    """Names accepted by `MoLoraConfig.from_preset`, sorted."""
    return sorted(PRESETS)


def preset_fields(name: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """Fields of a preset with `overrides` on top.

    Overriding `selection` drops the preset's settings that the new one does not read (such as `top_k`, or weights that
    need a threshold), since they would no longer mean anything.

    Raises:
        ConfigError: If there is no such preset.
    """
    if name not in PRESETS:
        raise ConfigError([Problem("preset", one_of(name, available_presets()))], "unknown preset")
    fields = PRESETS[name]()
    selection = overrides.get("selection", fields["selection"])
    if selection != fields["selection"]:
        if fields["weights"] in _OF_ANY_SELECTION:
            del fields["weights"]
        fields = {
            key: value for key, value in fields.items() if selection in SELECTIONS_OF_FIELD.get(key, (selection,))
        }
        if selection in ("dense", "sparsemixer") and fields.get("weights") != "biased_probability":
            fields.pop("balance_bias_rate", None)
        if selection == "dense":
            losses = fields.get("routing_losses", {})
            fields["routing_losses"] = {name: value for name, value in losses.items() if name != "load_balancing"}
    return {**fields, **overrides}
