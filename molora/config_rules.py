"""Which choices of a `MoLoraConfig` cannot go together, and which rarely do what was meant. Pure functions."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from molora.config_checks import FORMAT_VERSION, fewest_experts
from molora.config_effects import without_effect
from molora.config_losses import check_losses
from molora.errors import Problem
from molora.routing import DATA_INITS, SELECTIONS_OF_FIELD, SUMS_TO_ONE, reads

Config = Any
"""A `MoLoraConfig`; not imported, since its module calls the checks here."""


def check_combination(config: Config) -> Iterator[Problem]:
    """Values that are fine on their own and impossible together."""
    if config.format_version > FORMAT_VERSION:
        yield Problem(
            "format_version",
            f"this adapter was written in format {config.format_version}, and this molora reads up to "
            f"{FORMAT_VERSION}. Upgrade molora.",
        )
    own = list(_check_choices(config))
    yield from own
    if not own:
        yield from _check_schedules(config)


def _check_choices(config: Config) -> Iterator[Problem]:
    yield from _check_selection(config)
    yield from _check_router(config)
    yield from _check_experts(config)
    yield from _check_layout(config)
    yield from _check_scope(config)
    yield from _check_targets(config)
    yield from check_losses(config)
    yield from without_effect(config)


def _check_schedules(config: Config) -> Iterator[Problem]:
    """What schedules lead to must be possible too: an adapter is saved with the values it was last trained with."""
    for end in ("start", "end"):
        there = copy.copy(config)
        there.routing_schedules = {}
        for field, schedule in config.routing_schedules.items():
            setattr(there, field, schedule[end])
        for problem in _check_choices(there):
            yield Problem("routing_schedules", f"{end}: {problem.field}: {problem.message}")


def _check_selection(config: Config) -> Iterator[Problem]:
    fewest = fewest_experts(config)
    for name, selections in SELECTIONS_OF_FIELD.items():
        if getattr(config, name) is not None and config.selection not in selections:
            wanted = " or ".join(map(repr, selections))
            yield Problem(
                name, f"has no effect with selection={config.selection!r}; set selection={wanted} or leave it out."
            )
    choices = fewest + config.null_experts
    if config.selection in SELECTIONS_OF_FIELD["top_k"] and (config.top_k or 2) > choices:
        yield Problem("top_k", f"cannot select {config.top_k or 2} of {choices} experts (`num_experts`).")
    yield from _check_single(config)
    if config.gate == "identity" and (config.renormalize or config.selection == "top_p"):
        name, instead = ("renormalize", "renormalize=False") if config.renormalize else ("selection", "'top_k'")
        yield Problem(
            name, f"weights of gate='identity' have any sign, so shares of their sum mean nothing; set {instead}."
        )
    if config.selection == "sparsemixer" and config.renormalize and (config.top_k or 2) > 1:
        yield Problem("renormalize", "undoes the weights that 'sparsemixer' estimates; set renormalize=False.")
    if config.selection == "adaptive_threshold" and "input" not in reads(config.router):
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
    if config.selection == "top_1_or_2" and choices < 2:
        yield Problem("selection", "'top_1_or_2' needs two experts or more.")
    groups = config.expert_groups or 2
    if config.selection == "grouped_top_1" and choices % groups:
        yield Problem("expert_groups", f"{groups} groups do not divide {choices} experts (`num_experts`).")
    if config.weights == "biased_probability" and config.balance_bias_rate is None:
        yield Problem("weights", "'biased_probability' needs the bias of `balance_bias_rate`; set it.")


def _check_single(config: Config) -> Iterator[Problem]:
    """The weight of a single kept expert, made to sum to one, is always one."""
    of_groups = config.selection == "grouped_top_1" and config.expert_groups == 1
    single = of_groups or (config.selection in SELECTIONS_OF_FIELD["top_k"] and config.top_k == 1)
    softmaxed = config.weights == "selected_softmax"
    if single and (config.renormalize or softmaxed) and not config.freeze_router:
        yield Problem(
            "weights" if softmaxed else "renormalize",
            "renormalising a single expert makes its weight always 1, so the router gets no gradient; "
            + ("set weights='probability'" if softmaxed else "set renormalize=False")
            + ", or freeze_router=True.",
        )


def _check_router(config: Config) -> Iterator[Problem]:
    inputs = reads(config.router)
    fewest = fewest_experts(config)
    if config.router == "none" and (fewest > 1 or config.selection != "dense"):
        yield Problem(
            "router",
            "'none' is for a single expert (num_experts=1, selection='dense'); set router='linear' or 'static'.",
        )
    # A relu or a frozen expert aside, what is always one teaches the router nothing.
    always_one = config.renormalize or (config.gate in SUMS_TO_ONE and not config.null_experts)
    if inputs and fewest == 1 and always_one and not config.freeze_router:
        yield Problem(
            "num_experts",
            "routing over one expert makes its weight always 1, so the router gets no gradient; use two or more, or "
            "router='none' with selection='dense' (preset 'lora').",
        )
    if "task" in inputs and config.num_tasks is None:
        yield Problem("num_tasks", f"router={config.router!r} needs the number of tasks, clusters or domains.")
    if config.num_tasks is not None and "task" not in inputs:
        yield Problem("num_tasks", f"has no effect with router={config.router!r}; set router='task' or leave it out.")
    for name, needed in (("router_level", "sequence"), ("router_input", "base")):
        if getattr(config, name) == needed and "input" not in inputs:
            yield Problem(name, f"{needed!r} needs a router that reads the input; router={config.router!r} does not.")
    if config.router_level == "sequence" and config.selection == "adaptive_threshold":
        yield Problem("router_level", "'sequence' has no learned threshold; choose another `selection`.")
    if isinstance(config.num_experts, list) and config.router_sharing in ("model", "weights"):
        yield Problem(
            "router_sharing", "needs the same num_experts in all layers; set router_sharing='block' or 'none'."
        )
    if "hidden" in inputs:
        yield from _check_activation_router(config)
    if config.router == "recurrent" and config.router_level == "sequence":
        yield Problem("router_level", "'sequence' is not defined for router='recurrent'.")
    if config.router_init in DATA_INITS and config.router_norm == "none":
        yield Problem("router_init", f"{config.router_init!r} is made from data; set router_norm='standardize'.")
    wanted = config.experts_per_token
    if wanted is not None and wanted >= fewest:
        yield Problem("experts_per_token", f"got {wanted:g} of {fewest} experts (`num_experts`); set fewer.")
    elif wanted is not None and config.max_threshold is not None and config.max_threshold < 1 / wanted:
        yield Problem(
            "max_threshold",
            f"{config.max_threshold:g} may keep more than {wanted:g} experts however high thresholds are; set "
            f"{1 / wanted:g} or more, or leave it out.",
        )
    choices = fewest + config.null_experts
    if config.router_confidence is not None and config.router_confidence <= 1 / choices:
        yield Problem(
            "router_confidence",
            f"got {config.router_confidence:g}, and {choices} experts have {1 / choices:g} each when they are all "
            "alike; set more, such as 0.7.",
        )
    if config.router_norm != "none" and config.router_sharing == "weights":
        yield Problem("router_norm", "takes statistics of each module's input; set router_sharing='none' or 'input'.")
    if config.router_norm != "none" and config.router_input == "base":
        yield Problem("router_norm", "reads the input of each module; set router_input='module'.")
    if config.weights == "blend" and config.router == "external":
        yield Problem("weights", "'blend' mixes scores with a router of its own; set router='linear'.")


def _check_activation_router(config: Config) -> Iterator[Problem]:
    """A router that reads `A x` needs rows of A for each expert it routes to, and for no others."""
    if config.router_sharing != "none":
        yield Problem("router_sharing", f"router={config.router!r} has nothing to share; set router_sharing='none'.")
    if config.expert_layout != "separate":
        yield Problem("expert_layout", f"router={config.router!r} needs rows of A for each expert; set 'separate'.")
    if config.router == "activation_norm":
        if config.null_experts:
            yield Problem("null_experts", "have no activation that could be compared with others'; leave them out.")
        return
    ranks = [config.r, *config.rank_pattern.values()]
    if any(rank != 1 for rank in ranks) or config.imported_experts:
        yield Problem("r", f"router={config.router!r} takes each rank for an expert; set r=1, everywhere.")
    for name in ("null_experts", "shared_experts"):
        if getattr(config, name):
            yield Problem(name, f"router={config.router!r} takes each rank for an expert; leave them out.")


def _check_experts(config: Config) -> Iterator[Problem]:
    total = fewest_experts(config) + config.shared_experts
    if config.frozen_experts > total:
        counted = "`num_experts`" + " and `shared_experts`" * bool(config.shared_experts)
        yield Problem("frozen_experts", f"cannot freeze {config.frozen_experts} of {total} experts ({counted}).")
    if config.frozen_experts and config.expert_layout not in ("separate", "factors"):
        yield Problem(
            "frozen_experts",
            f"expert_layout={config.expert_layout!r} has no experts of their own to freeze; "
            "set expert_layout='separate', or freeze_A=True to keep A.",
        )
    if config.frozen_experts and config.freeze_A and config.frozen_experts < total:
        yield Problem("freeze_A", "goes with experts that are all trained or all frozen; leave out `frozen_experts`.")
    if config.null_experts and config.selection == "dense":
        yield Problem("null_experts", "selection='dense' keeps all experts, so none could be replaced by a null one.")
    if config.null_experts and config.expert_scope == "ffn":
        yield Problem("null_experts", "cannot stand in for a whole feed-forward block; set expert_scope='linear'.")
    if config.shared_weight == "remainder" and not config.shared_experts:
        yield Problem("shared_weight", "has no effect without `shared_experts`.")
    if config.imported_experts is not None and len(config.imported_experts) > total:
        yield Problem("imported_experts", f"lists {len(config.imported_experts)} of {total} experts (`num_experts`).")
    if isinstance(config.num_experts, list) and (config.shared_experts or config.expert_scope == "ffn"):
        yield Problem("num_experts", "as a list it goes with neither shared experts nor expert_scope='ffn'.")
    if config.capacity_factor is not None and config.selection not in SELECTIONS_OF_FIELD["top_k"]:
        yield Problem("capacity_factor", "needs a fixed number of experts per token; set selection='top_k'.")


def _check_layout(config: Config) -> Iterator[Problem]:
    layout, unequal = config.expert_layout, isinstance(config.r, list)
    if layout in ("shared_A", "factors", "shards") and unequal:
        yield Problem("r", f"expert_layout={layout!r} needs the same rank for every expert; set one number.")
    if layout in ("shared_A", "factors", "shards") and any(isinstance(r, list) for r in config.rank_pattern.values()):
        yield Problem("rank_pattern", f"expert_layout={layout!r} needs the same rank for every expert in a module.")
    if layout == "pairs":
        if not unequal or config.r[0] * config.r[1] != config.num_experts:
            yield Problem(
                "num_experts",
                f"expert_layout='pairs' has r[0] · r[1] experts, and r={config.r!r} does not give "
                f"{config.num_experts!r}; set r=[rows of A, columns of B].",
            )
        if config.shared_experts:
            yield Problem("shared_experts", "go with expert_layout='separate' only.")
    if layout in ("factors", "pairs") and config.router == "none":
        yield Problem("expert_layout", f"{layout!r} mixes experts by their weights; router='none' has none.")
    if layout == "factors" and config.router != "none":
        per_token = reads(config.router) & {"input", "hidden"} and config.router_level != "sequence"
        if per_token:
            yield Problem(
                "expert_layout",
                "'factors' mixes matrices once per sequence; set router_level='sequence', or a router of tasks.",
            )
    if layout == "shards" and (config.router != "none" or config.num_experts != 1 or config.shared_experts):
        yield Problem(
            "expert_layout",
            "'shards' is one expert without router; set num_experts=1, shared_experts=0 and router='none'.",
        )
    if layout == "shards" and isinstance(config.r, int):
        pool = config.pool_rank or config.r
        if not config.private_rank < pool <= config.r and not (pool == config.r == config.private_rank):
            yield Problem("pool_rank", f"must be above private_rank={config.private_rank} and at most r={config.r}.")
    only_for = (("num_shards", "shards", 1), ("private_rank", "shards", 0), ("num_splits", "factors", 1))
    for name, wanted, unset in only_for:
        if getattr(config, name) != unset and layout != wanted:
            yield Problem(name, f"has no effect with expert_layout={layout!r}; set expert_layout={wanted!r}.")
    if config.num_splits > 1 and config.router != "table":
        yield Problem("num_splits", "needs weights for each part; set router='table'.")
    if config.num_splits > 1 and config.frozen_experts:
        yield Problem("num_splits", "goes with experts that are all trained; leave out `frozen_experts`.")


def _check_scope(config: Config) -> Iterator[Problem]:
    if config.expert_scope == "ffn":
        fixed = {"expert_layout": "separate", "adapter_position": "parallel", "router_sharing": "none"}
        for name, wanted in fixed.items():
            if getattr(config, name) != wanted:
                yield Problem(name, f"expert_scope='ffn' shares one router per block already; set {name}={wanted!r}.")
        if config.expert_activation or config.expert_bias or config.shared_experts:
            yield Problem("expert_scope", "'ffn' goes with plain LoRA experts: no bias, activation or shared ones.")
        if isinstance(config.r, list):
            yield Problem("r", "is also the rank of plain LoRAs outside the block; set one number, or `rank_pattern`.")
        yield from _check_never_empty(config)
        if "hidden" in reads(config.router) or config.router in ("none", "recurrent"):
            yield Problem("router", f"{config.router!r} cannot decide for a whole block; set router='linear'.")
    if config.expert_scope == "block" and config.target_modules == "all-linear":
        yield Problem(
            "target_modules", "'all-linear' names no blocks; name those from hidden states to hidden states."
        )
    if config.adapter_position == "after" and config.expert_scope == "linear" and config.expert_layout == "shards":
        yield Problem("adapter_position", "expert_layout='shards' reads the module's input; set 'parallel'.")


def _check_never_empty(config: Config) -> Iterator[Problem]:
    """A token without an expert would lose the whole feed-forward block, which is inside the mixture."""
    why = "can leave a token without an expert, and so without its feed-forward block; "
    if config.selection in ("threshold", "adaptive_threshold"):
        yield Problem("selection", f"{config.selection!r} {why}set 'top_k', 'top_p' or 'dense'.")
    if config.gate == "relu":
        yield Problem("gate", f"'relu' {why}set 'softmax' or 'sigmoid'.")
    for name, unset in (("min_logit", None), ("capacity_factor", None), ("expert_dropout", 0)):
        if getattr(config, name) != unset:
            yield Problem(name, f"{why}leave it out.")


def _check_targets(config: Config) -> Iterator[Problem]:
    restricted = config.layers_to_transform is not None or config.depth_range is not None
    name = "layers_to_transform" if config.layers_to_transform is not None else "depth_range"
    if isinstance(config.target_modules, str) and config.target_modules != "all-linear" and restricted:
        yield Problem(name, "needs `target_modules` as a list of names, not as one regular expression.")
    if config.layers_pattern and not restricted:
        yield Problem("layers_pattern", "has no effect without `layers_to_transform`.")


def advice(config: Config) -> Iterator[str]:
    """Sentences about choices that work but rarely as meant."""
    level = {"threshold": config.threshold, "adaptive_threshold": config.max_threshold}.get(config.selection)
    even = 1 / fewest_experts(config)
    if config.gate == "softmax" and level is not None and level > even and config.experts_per_token is None:
        name = "threshold" if config.selection == "threshold" else "max_threshold"
        yield (
            f"{name}={level:g} is above 1/num_experts = {even:g}: a token whose probabilities are "
            "all below it loses every expert and gets the base model's output."
        )
