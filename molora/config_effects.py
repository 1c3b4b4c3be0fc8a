"""Fields of a `MoLoraConfig` that would do nothing, where silence would mislead. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from molora.errors import Problem
from molora.routing import SELECTIONS_OF_FIELD, SUMS_TO_ONE, reads

Config = Any
"""A `MoLoraConfig`; not imported, since its module calls the checks here."""

_UNSET: dict[str, Any] = {
    "router_bias": False,
    "router_dim": None,
    "router_jitter": 0,
    "router_init_range": 0.02,
    "init_A": "kaiming_uniform",
    "init_A_range": 0.02,
    "blend_coefficients": [1.0, 1.0],
    "pool_rank": None,
    "freeze_A": False,
    "expert_bias": False,
    "score_weight": None,
    "balance_bias_rate": None,
    "shared_weight": "one",
    "router_init": "kaiming_uniform",
    "router_norm": "none",
    "router_confidence": None,
    "router_lr_ratio": 1.0,
    "calibration_rows": 96,
    "threshold_start": None,
    "experts_per_token": None,
    "gate": "softmax",
    "temperature": 1,
    "logit_norm": None,
    "router_noise": 0,
    "router_sharing": "none",
    "min_logit": None,
    "expert_dropout": 0,
    "capacity_factor": None,
    "routing_schedules": {},
    "dropout_position": "input",
}
"""The value of each field that asks for nothing."""

_OF_SPARSEMIXER = ("gate", "temperature", "min_logit", "expert_dropout", "capacity_factor", "balance_bias_rate")
_OF_DECISIONS = (
    *("gate", "temperature", "logit_norm", "router_noise", "router_init", "router_sharing", "min_logit"),
    *("router_norm", "router_lr_ratio"),
    *("expert_dropout", "score_weight", "balance_bias_rate", "routing_schedules"),
)
_ROWS_ONLY = ("linear", "prototype", "arrow", "recurrent", "domain")
_WITHOUT_PARAMETERS = ("none", "external", "activation", "unit_activation", "activation_norm")
_INITIALISED = ("linear", "mlp", "cosine", "prototype", "normalized", "arrow", "recurrent", "task", "domain", "static")


def without_effect(config: Config) -> Iterator[Problem]:
    """Fields that are set and that nothing reads."""
    for name, why, helps in _unread(config):
        unset = _UNSET[name]
        value = getattr(config, name)
        if (list(value) if isinstance(value, tuple) else value) != unset:
            yield Problem(name, f"has no effect with {why}; {helps} or {name}={unset!r}.")
    yield from _schedules_without_effect(config)
    yield from _untrained(config)
    if config.selection == "sparsemixer" and config.weights not in (None, "probability"):
        yield Problem("weights", f"{config.weights!r} has no effect with selection='sparsemixer'; leave it out.")
    if config.router == "none" and config.weights not in (None, "probability"):
        yield Problem("weights", f"{config.weights!r} has no effect with router='none'; leave it out.")
    if config.router == "static" and config.router_init == "normal":
        yield Problem("router_init", "'normal' has no effect with router='static'; set 'ones', or leave it out.")
    always_all = config.selection == "dense" and config.gate in SUMS_TO_ONE
    if config.shared_weight == "remainder" and (config.renormalize or always_all):
        yield Problem(
            "shared_weight",
            "'remainder' is always nothing where routed weights sum to one; set renormalize=False and a "
            "selection that leaves experts out.",
        )


def _untrained(config: Config) -> Iterator[Problem]:
    """Parameters that would never get a gradient."""
    trains = config.router not in _WITHOUT_PARAMETERS and not config.freeze_router
    steered = config.experts_per_token is not None  # by the counts of a step, which needs no gradient
    of_level = config.weights in (None, "probability_minus_threshold")
    if config.selection == "adaptive_threshold" and not of_level and not steered:
        yield Problem(
            "weights",
            f"{config.weights!r} gives the threshold of 'adaptive_threshold' no gradient; leave it out, or set "
            "experts_per_token, which moves thresholds without one.",
        )
    elif trains and config.weights == "one" and not config.routing_losses:
        yield Problem(
            "weights",
            "'one' gives the router no gradient; set weights='probability', freeze_router=True or a routing loss.",
        )
    if config.selection == "sparsemixer" and not config.router_jitter:
        yield Problem("router_jitter", "of 0 leaves 'sparsemixer' one expert at a time, without a gradient; set 0.1.")
    starts_at_zero = config.router_init != "ones" if config.router == "static" else config.router_init == "zeros"
    if trains and config.gate == "relu" and config.router in (*_ROWS_ONLY, "static") and starts_at_zero:
        instead = "ones" if config.router == "static" else "kaiming_uniform"
        yield Problem("router_init", f"gate='relu' has no slope at logits of zero; set router_init={instead!r}.")


def _unread(config: Config) -> Iterator[tuple[str, str, str]]:
    """A field, the choice that makes it idle, and what to set for it to matter."""
    router, layout = f"router={config.router!r}", f"expert_layout={config.expert_layout!r}"
    if config.router not in ("linear", "task"):
        yield "router_bias", router, "set router='linear'"
    if config.router not in ("mlp", "cosine", "recurrent", "task"):
        yield "router_dim", router, "set a router with an inner space, such as 'mlp',"
    if "input" not in reads(config.router) and config.selection != "sparsemixer":
        yield "router_jitter", router, "set a router that reads the input"
    if config.router not in _INITIALISED and config.router != "none":
        yield "router_init", router, "set another router"
    if config.router_init != "normal":
        yield "router_init_range", f"router_init={config.router_init!r}", "set router_init='normal'"
    if config.router != "linear":
        yield "router_norm", router, "set router='linear'"
    if config.router_norm == "none":
        for name in ("calibration_rows", "router_confidence"):
            yield name, "router_norm='none'", "set router_norm='standardize'"
    if config.selection != "adaptive_threshold":
        for name in ("threshold_start", "experts_per_token"):
            yield name, f"selection={config.selection!r}", "set selection='adaptive_threshold'"
    if config.freeze_router or config.router in _WITHOUT_PARAMETERS:
        yield "router_lr_ratio", "no router that is trained", "leave out `freeze_router`, or set router='linear'"
    if config.init_A != "normal":
        yield "init_A_range", f"init_A={config.init_A!r}", "set init_A='normal'"
    if not config.lora_dropout:
        yield "dropout_position", "lora_dropout=0", "set lora_dropout"
    if config.weights != "blend":
        yield "blend_coefficients", f"weights={config.weights!r}", "set weights='blend'"
    if config.expert_layout != "shards":
        yield "pool_rank", layout, "set expert_layout='shards'"
    else:
        for name in ("freeze_A", "expert_bias", "init_A"):
            yield name, layout, "set expert_layout='separate'"
    if config.num_splits > 1:
        yield "expert_bias", f"num_splits={config.num_splits}", "set num_splits=1"
    if config.router == "external":
        yield "score_weight", router, "set a router of its own"
    if config.selection == "dense" and config.weights != "biased_probability":
        yield "balance_bias_rate", "selection='dense'", "set selection='top_k'"
    elif not reads(config.router):
        yield "balance_bias_rate", router, "set router='linear'"
    if config.router == "none":
        for name in (*_OF_DECISIONS, "shared_weight"):
            yield name, router, "set router='linear'"
    if config.selection == "sparsemixer":
        for name in _OF_SPARSEMIXER:
            yield name, "selection='sparsemixer'", "set selection='top_k'"


def _schedules_without_effect(config: Config) -> Iterator[Problem]:
    """Schedules of fields that the selection does not read, or to more experts than there are."""
    fewest = min(config.num_experts) if isinstance(config.num_experts, list | tuple) else config.num_experts
    choices = fewest + config.null_experts
    for name, schedule in config.routing_schedules.items():
        selections = SELECTIONS_OF_FIELD.get(name, (config.selection,))
        idle = config.selection == "sparsemixer" and name in _OF_SPARSEMIXER
        if config.selection not in selections or idle:
            yield Problem("routing_schedules", f"{name!r} has no effect with selection={config.selection!r}.")
        elif name == "top_k" and max(schedule["start"], schedule["end"]) > choices:
            yield Problem("routing_schedules", f"'top_k' goes beyond {choices} experts (`num_experts`).")
