"""What makes a `MoLoraConfig` impossible, or worth a warning. Pure functions over its fields."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from molora.errors import Problem, one_of
from molora.layouts import ACTIVATIONS, LAYOUTS
from molora.losses import LOSSES, coefficient_problem, option_problem, settings_of
from molora.routing import GATES, NORMS, ROUTER_INITS, ROUTERS, SELECTIONS, WEIGHTS
from molora.routing.schedules import schedule_problems

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
    "router_norm": dict.fromkeys(NORMS),
    "expert_layout": LAYOUTS,
    "expert_activation": ACTIVATIONS,
    "shared_weight": dict.fromkeys(("one", "remainder")),
    "init_A": dict.fromkeys(("kaiming_uniform", "normal", "orthogonal", "sparse_normal")),
    "dropout_position": dict.fromkeys(("input", "hidden")),
    "scale_by": dict.fromkeys(("expert", "total")),
    "expert_scope": dict.fromkeys(("linear", "ffn", "block")),
    "adapter_position": dict.fromkeys(("parallel", "after")),
    "router_input": dict.fromkeys(("module", "base")),
    "router_level": dict.fromkeys(("token", "sequence")),
    "router_sharing": dict.fromkeys(("none", "input", "block", "model", "weights")),
    "bias": dict.fromkeys(("none", "all", "molora_only")),
}
"""Fields that take one of a closed set of names."""

OPTIONAL_NAMES = ("weights", "expert_activation")
"""Those of them that may be left out."""


def fewest_experts(config: Config) -> int:
    """The number of routed experts where there are fewest."""
    return config.num_experts if isinstance(config.num_experts, int) else min(config.num_experts)


def _is_int(value: object, minimum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def _is_number(value: object, low: float, high: float = math.inf) -> bool:
    """Whether `low < value <= high`, and finite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and low < value <= high and value < math.inf


def _is_rank(value: object, lengths: Collection[int], least: int = 1) -> bool:
    """Whether a value is a rank, or a list of as many as there are experts in the bank."""
    if isinstance(value, list | tuple):
        return len(value) in lengths and all(_is_int(r, least) for r in value)
    return _is_int(value, 1)


def check_types(config: Config) -> Iterator[Problem]:
    """Values that are wrong on their own. Nothing else is worth checking while there are any."""
    for name, allowed in NAMES.items():
        value = getattr(config, name)
        if not (isinstance(value, str) and value in allowed) and not (name in OPTIONAL_NAMES and value is None):
            yield Problem(name, one_of(value, allowed))
    yield from _check_shapes(config)
    yield from _check_ranks(config)
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
    for name in _FLAGS:
        if not isinstance(getattr(config, name), bool):
            yield Problem(name, f"got {getattr(config, name)!r}; must be true or false.")
    yield from _check_numbers(config)
    yield from _check_options(config)


def _check_ranks(config: Config) -> Iterator[Problem]:
    """Numbers of experts and their ranks."""
    numbers = config.num_experts if isinstance(config.num_experts, list | tuple) else [config.num_experts]
    if not numbers or not all(_is_int(number, 1) for number in numbers):
        yield Problem(
            "num_experts",
            f"got {config.num_experts!r}; must be an integer of at least 1, or a list of them that goes with depth.",
        )
        return
    lengths: Collection[int] = ()
    if config.expert_layout == "pairs":
        lengths, lists = (2,), "a list of two, rows of A and columns of B"
    elif len(numbers) > 1:
        lists = "the same for all experts, as `num_experts` is a list"
    else:
        shared = config.shared_experts if _is_int(config.shared_experts, 0) else 0
        lengths = (numbers[0] + shared,)
        lists = f"a list of {lengths[0]} of them, one for each of the `num_experts`"
        lists += " and shared experts" * bool(shared)
    if not _is_rank(config.r, lengths):
        yield Problem("r", f"got {config.r!r}; must be an integer of at least 1 (the rank of one expert), or {lists}.")
    # In a module of its own an expert may have no rank, as where it was pruned.
    named = config.rank_pattern.items() if isinstance(config.rank_pattern, Mapping) else ()
    of_depth = len(numbers) > 1 and config.expert_layout != "pairs"
    if of_depth:
        lengths, lists = numbers, "a list of as many as the module has experts"
    for pattern, r in named:
        if not _is_rank(r, lengths, least=1 if config.expert_layout == "pairs" else 0):
            yield Problem(
                "rank_pattern",
                f"{pattern!r}: got {r!r}; must be an integer of at least 1 (the rank of one expert), or {lists}.",
            )


_FLAGS = (
    "renormalize",
    "use_rslora",
    "init_weights",
    "fan_in_fan_out",
    "expert_bias",
    "freeze_A",
    "freeze_router",
    "router_bias",
)

_COUNTS: dict[str, tuple[int, bool]] = {
    "shared_experts": (0, False),
    "null_experts": (0, False),
    "frozen_experts": (0, False),
    "private_rank": (0, False),
    "num_splits": (1, False),
    "num_shards": (1, False),
    "pool_rank": (1, True),
    "router_dim": (1, True),
    "num_tasks": (1, True),
    "top_k": (1, True),
    "expert_groups": (1, True),
    "calibration_rows": (1, False),
}
"""Integer fields: the least value, and whether they may be left out."""

_NUMBERS: dict[str, tuple[float, float, bool]] = {
    "init_A_range": (0.0, math.inf, False),
    "score_weight": (-math.inf, math.inf, True),
    "logit_norm": (0.0, math.inf, True),
    "min_logit": (-math.inf, math.inf, True),
    "capacity_factor": (0.0, math.inf, True),
    "balance_bias_rate": (0.0, math.inf, True),
    "router_lr_ratio": (0.0, math.inf, False),
    "experts_per_token": (0.0, math.inf, True),
    "top_p": (0.0, 1.0, True),
    "threshold": (0.0, 1.0, True),
    "max_threshold": (0.0, 1.0, True),
}
"""Number fields: above what, up to what, and whether they may be left out."""


def _check_numbers(config: Config) -> Iterator[Problem]:
    for name, (least, optional) in _COUNTS.items():
        value = getattr(config, name)
        if not (_is_int(value, least) or (optional and value is None)):
            yield Problem(name, f"got {value!r}; must be an integer of at least {least}.")
    for name, (low, high, optional) in _NUMBERS.items():
        value = getattr(config, name)
        if not (_is_number(value, low, high) or (optional and value is None)):
            bounds = f" in ({low:g}, {high:g}]" if high < math.inf else " above 0" if low == 0 else ""
            yield Problem(name, f"got {value!r}; must be a number{bounds}.")
    for name, below in (("router_noise", math.inf), ("router_jitter", 1.0), ("expert_dropout", 1.0)):
        value = getattr(config, name)
        if not (value == 0 or (_is_number(value, 0) and value < below)):
            yield Problem(name, f"got {value!r}; must be a number in [0, {below:g}).")
    confidence = config.router_confidence
    if not (confidence is None or (_is_number(confidence, 0) and confidence < 1)):
        yield Problem("router_confidence", f"got {confidence!r}; must be a number in (0, 1).")
    start = config.threshold_start
    if not (start is None or (_is_number(start, 0) and start < 1)):
        yield Problem("threshold_start", f"got {start!r}; must be a number in (0, 1).")
    if not (config.top_gap is None or config.top_gap == 0 or _is_number(config.top_gap, 0)):
        yield Problem("top_gap", f"got {config.top_gap!r}; must be a number of at least 0.")
    pair = config.blend_coefficients
    if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(_is_number(n, -math.inf) for n in pair)):
        yield Problem("blend_coefficients", f"got {pair!r}; must be two numbers, for the router and for the scores.")
    depth = config.depth_range
    if depth is not None and not (
        isinstance(depth, list | tuple)
        and len(depth) == 2
        and all(n == 0 or _is_number(n, 0, 1) for n in depth)
        and depth[0] < depth[1]
    ):
        yield Problem("depth_range", f"got {depth!r}; must be two rising numbers in [0, 1], such as [0.5, 1].")
    if not _all_are(config.ffn_modules, str):
        yield Problem("ffn_modules", f"got {config.ffn_modules!r}; must be a list of module names.")


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
    if not isinstance(config.routing_schedules, Mapping):
        yield Problem("routing_schedules", f"got {config.routing_schedules!r}; must map fields to schedules.")
    else:
        for problem in schedule_problems(config.routing_schedules):
            yield Problem("routing_schedules", problem)
    if not isinstance(config.routing_losses, Mapping):
        yield Problem("routing_losses", f"got {config.routing_losses!r}; must map loss names to coefficients.")
        return
    for name, setting in config.routing_losses.items():
        if name not in LOSSES:
            yield Problem("routing_losses", one_of(name, LOSSES))
            continue
        yield from _check_loss(name, setting)


def _check_loss(name: str, setting: Any) -> Iterator[Problem]:
    coefficient, options = settings_of(setting)
    problem = coefficient_problem(coefficient)
    if problem is not None:
        yield Problem("routing_losses", f"{name}: {problem}")
    for option, value in options.items():
        problem = option_problem(name, option, value)
        if problem:
            yield Problem("routing_losses", problem)
