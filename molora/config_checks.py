"""What makes a `MoLoraConfig` impossible, or worth a warning. Pure functions over its fields."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from molora.errors import Problem, did_you_mean, one_of
from molora.losses import LOSSES
from molora.routing import (
    GATES,
    INPUT_DEPENDENT_ROUTERS,
    ROUTER_INITS,
    ROUTERS,
    SELECTION_OF_FIELD,
    SELECTIONS,
    WEIGHTS,
)

Config = Any
"""A `MoLoraConfig`; not imported, since its module calls the checks here."""

FORMAT_VERSION = 1
"""Version of the checkpoint format: parameter names, their shapes and the fields that give them meaning."""

MIN_TEMPERATURE = 1e-4
"""Below it, logits divided by the temperature leave the range of fp32."""

NAMES: dict[str, Mapping[str, Any]] = {
    "router": ROUTERS,
    "gate": GATES,
    "selection": SELECTIONS,
    "weights": WEIGHTS,
    "router_init": ROUTER_INITS,
    "bias": dict.fromkeys(("none", "all", "molora_only")),
}
"""Fields that take one of a closed set of names."""


def _is_int(value: object, minimum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def _is_number(value: object, low: float, high: float = math.inf) -> bool:
    """Whether `low < value <= high`, and finite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and low < value <= high and value < math.inf


def _is_rank(value: object, num_experts: int) -> bool:
    if isinstance(value, list | tuple):
        return len(value) == num_experts and all(_is_int(r, 1) for r in value)
    return _is_int(value, 1)


def check_types(config: Config) -> Iterator[Problem]:
    """Values that are wrong on their own. Nothing else is worth checking while there are any."""
    for name, allowed in NAMES.items():
        value = getattr(config, name)
        if not (isinstance(value, str) and value in allowed) and not (name == "weights" and value is None):
            yield Problem(name, one_of(value, allowed))
    yield from _check_shapes(config)
    if not _is_int(config.num_experts, 1):
        yield Problem("num_experts", f"got {config.num_experts!r}; must be an integer of at least 1.")
    elif not _is_rank(config.r, config.num_experts):
        yield Problem(
            "r",
            f"got {config.r!r}; must be an integer of at least 1 (the rank of one expert), or a list of "
            f"{config.num_experts} of them, one for each of the `num_experts`.",
        )
    elif isinstance(config.rank_pattern, Mapping):
        for pattern, r in config.rank_pattern.items():
            if not _is_rank(r, config.num_experts):
                yield Problem("rank_pattern", f"{pattern!r}: got {r!r}; must be a rank as in `r`.")
    alphas = config.alpha_pattern.items() if isinstance(config.alpha_pattern, Mapping) else ()
    for pattern, alpha in [("", config.lora_alpha), *alphas]:
        if not _is_number(alpha, 0):
            name = "alpha_pattern" if pattern else "lora_alpha"
            yield Problem(name, f"{pattern!r}: " * bool(pattern) + f"got {alpha!r}; must be a number above 0.")
    if not (_is_number(config.lora_dropout, -1, 1) and 0 <= config.lora_dropout < 1):
        yield Problem("lora_dropout", f"got {config.lora_dropout!r}; must be a number in [0, 1).")
    for name, least in (("temperature", MIN_TEMPERATURE), ("router_init_range", 0.0)):
        value = getattr(config, name)
        if not (_is_number(value, 0) and value >= least):
            yield Problem(
                name, f"got {value!r}; must be a number " + (f"of at least {least:g}." if least else "above 0.")
            )
    for name in ("renormalize", "use_rslora", "init_weights", "fan_in_fan_out"):
        if not isinstance(getattr(config, name), bool):
            yield Problem(name, f"got {getattr(config, name)!r}; must be true or false.")
    yield from _check_options(config)


def _check_shapes(config: Config) -> Iterator[Problem]:
    """Fields that PEFT reads without looking: one of the wrong kind would fail deep inside it."""
    for name in ("target_modules", "exclude_modules"):
        value = getattr(config, name)
        if isinstance(value, str):
            yield from _check_pattern(name, value)
        elif not (value is None or _all_are(value, str)):
            yield Problem(name, f"got {value!r}; must be a list of module names, or one regular expression.")
    if not (config.modules_to_save is None or _all_are(config.modules_to_save, str)):
        yield Problem("modules_to_save", f"got {config.modules_to_save!r}; must be a list of module names.")
    layers = config.layers_to_transform
    if not (layers is None or _is_int(layers, 0) or (_all_are(layers, int) and all(_is_int(n, 0) for n in layers))):
        yield Problem("layers_to_transform", f"got {layers!r}; must be a layer index from 0, or a list of them.")
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(getattr(config, name), Mapping):
            yield Problem(name, f"got {getattr(config, name)!r}; must map module names or patterns to values.")
            continue
        for pattern in getattr(config, name):
            yield from _check_pattern(name, pattern)
    if not _is_int(config.format_version, 1):
        yield Problem("format_version", f"got {config.format_version!r}; must be an integer of at least 1.")


def _check_pattern(name: str, pattern: str) -> Iterator[Problem]:
    try:
        re.compile(pattern)
    except re.error as error:
        yield Problem(name, f"got {pattern!r}, which is no regular expression: {error}.")


def _all_are(value: object, kind: type) -> bool:
    return isinstance(value, list | tuple | set) and all(isinstance(item, kind) for item in value)


def _check_options(config: Config) -> Iterator[Problem]:
    if config.top_k is not None and not _is_int(config.top_k, 1):
        yield Problem("top_k", f"got {config.top_k!r}; must be an integer of at least 1.")
    for name in ("top_p", "threshold", "max_threshold"):
        value = getattr(config, name)
        if value is not None and not _is_number(value, 0, 1):
            yield Problem(name, f"got {value!r}; must be a number in (0, 1].")
    if not isinstance(config.routing_losses, Mapping):
        yield Problem("routing_losses", f"got {config.routing_losses!r}; must map loss names to coefficients.")
        return
    for name, setting in config.routing_losses.items():
        if name not in LOSSES:
            yield Problem("routing_losses", one_of(name, LOSSES))
            continue
        yield from _check_loss(name, setting)


def _check_loss(name: str, setting: Any) -> Iterator[Problem]:
    options = dict(setting) if isinstance(setting, Mapping) else {"coefficient": setting}
    coefficient = options.pop("coefficient", None)
    if not (coefficient == 0 or _is_number(coefficient, 0)):
        yield Problem(
            "routing_losses",
            f"{name}: got {setting!r}; must be a coefficient of at least 0, or a mapping with `coefficient`.",
        )
    allowed = LOSSES[name].options
    for option, value in options.items():
        if option not in allowed:
            yield Problem(
                "routing_losses",
                f"{name}: unknown option {option!r}; allowed are coefficient, {', '.join(sorted(allowed))}."
                + did_you_mean(option, ["coefficient", *allowed]),
            )
        elif value not in allowed[option]:
            yield Problem("routing_losses", f"{name}.{option}: {one_of(value, map(str, allowed[option]))}")


def check_combination(config: Config) -> Iterator[Problem]:
    """Values that are fine on their own and impossible together."""
    routed = config.router in INPUT_DEPENDENT_ROUTERS
    if config.format_version > FORMAT_VERSION:
        yield Problem(
            "format_version",
            f"this adapter was written in format {config.format_version}, and this molora reads up to "
            f"{FORMAT_VERSION}. Upgrade molora.",
        )
    for name, selection in SELECTION_OF_FIELD.items():
        if getattr(config, name) is not None and config.selection != selection:
            yield Problem(
                name,
                f"has no effect with selection={config.selection!r}; set selection={selection!r} or leave it out.",
            )
    if config.selection == "top_k" and (config.top_k or 2) > config.num_experts:
        yield Problem("top_k", f"cannot select {config.top_k or 2} of {config.num_experts} experts (`num_experts`).")
    if config.selection == "top_k" and config.top_k == 1 and config.renormalize:
        yield Problem(
            "renormalize",
            "renormalising a single expert makes its weight always 1, so the router gets no gradient; "
            "set renormalize=False.",
        )
    if config.selection == "adaptive_threshold" and not routed:
        yield Problem(
            "selection",
            f"'adaptive_threshold' reads the input, which router={config.router!r} does not; "
            "set selection='dense' or router='linear'.",
        )
    if config.weights == "probability_minus_threshold" and "threshold" not in config.selection:
        yield Problem(
            "weights",
            f"'probability_minus_threshold' needs a threshold, and selection={config.selection!r} has none; "
            "set weights='probability'.",
        )
    if config.router == "none" and (config.num_experts > 1 or config.selection != "dense"):
        yield Problem(
            "router",
            "'none' is for a single expert (num_experts=1, selection='dense'); set router='linear' or 'static'.",
        )
    if routed and config.num_experts == 1 and (config.gate == "softmax" or config.renormalize):
        yield Problem(
            "num_experts",
            "routing over one expert makes its weight always 1, so the router gets no gradient; use two or more, or "
            "router='none' with selection='dense' (preset 'lora').",
        )
    if config.routing_losses and not routed:
        yield Problem("routing_losses", f"need a router that reads the input; router={config.router!r} does not.")
    yield from _check_targets(config)


def _check_targets(config: Config) -> Iterator[Problem]:
    if isinstance(config.target_modules, str) and config.layers_to_transform is not None:
        yield Problem(
            "layers_to_transform", "needs `target_modules` as a list of names, not as one regular expression."
        )
    if config.layers_pattern and config.layers_to_transform is None:
        yield Problem("layers_pattern", "has no effect without `layers_to_transform`.")


def advice(config: Config) -> Iterator[str]:
    """Sentences about choices that work but rarely as meant."""
    level = {"threshold": config.threshold, "adaptive_threshold": config.max_threshold}.get(config.selection)
    if config.gate == "softmax" and level is not None and level > 1 / config.num_experts:
        name = "threshold" if config.selection == "threshold" else "max_threshold"
        yield (
            f"{name}={level:g} is above 1/num_experts = {1 / config.num_experts:g}: a token whose probabilities are "
            "all below it loses every expert and gets the base model's output."
        )
