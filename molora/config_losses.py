"""Which routing losses the other choices of a `MoLoraConfig` leave without meaning. Pure functions over its fields."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from molora.config_checks import fewest_experts
from molora.errors import Problem
from molora.losses import ADAPTIVE, coefficient_at, is_scheduled, loss_needs, settings_of
from molora.routing import ROUTERS, reads
from molora.routing.gates import EXACT_ZEROS

Config = Any
"""A `MoLoraConfig`; not imported, since its module calls the checks here."""

_ROWS_OF_INPUT = ("linear", "arrow", "prototype", "cosine")
"""Routers whose rows lie in the space of the input."""

_OF_SHARES = (
    *("load_balancing", "localized_balancing", "mutual_information", "parameter_penalty", "router_entropy"),
    *("batch_entropy", "importance", "gate_contrastive"),
)
"""Losses of shares of probability, which numbers of any sign have none of."""

_OF_ONE_EXPERT = ("router_z", "consistency")
"""Losses that mean something for a single expert too."""

_NOISY_GATES = ("gumbel_softmax", "relaxed_bernoulli")


def check_losses(config: Config) -> Iterator[Problem]:
    """Losses that read what this routing does not have, or that could teach it nothing."""
    losses = config.routing_losses
    if losses and not reads(config.router):
        yield Problem("routing_losses", f"need a router that reads the input; router={config.router!r} does not.")
    for name, setting in losses.items():
        check = _CHECKS.get(name)
        _, options = settings_of(setting)
        needs = loss_needs(name, setting)
        problems = [*(check(config, options) if check else ()), *_of_parts(config, needs), *_of_shares(config, name)]
        if name not in _OF_ONE_EXPERT and fewest_experts(config) + config.null_experts == 1:
            problems.append("compares experts, and there is one.")
        for problem in problems:
            yield Problem("routing_losses", f"{name}: {problem}")
    yield from _check_coefficients(losses)


def reads_hidden(config: Config) -> bool:
    """Whether a routing loss of an adapter reads what its experts make of a token, which no kernel gives away."""
    return any("columns" in loss_needs(name, setting) for name, setting in config.routing_losses.items())


def view_dropout(config: Config) -> float | None:
    """Share of features left out in the second view that `gate_contrastive` compares with; `None` without it."""
    setting = config.routing_losses.get("gate_contrastive")
    if setting is None:
        return None
    _, options = settings_of(setting)
    return options.get("mask_ratio", 0.2) if options.get("positives", "view") == "view" else None


def _check_coefficients(losses: dict[str, Any]) -> Iterator[Problem]:
    for name, setting in losses.items():
        _, options = settings_of(setting)
        controlled = name == "l1_sparsity" or ADAPTIVE.given(options.get("adaptive")) is not None
        if controlled and is_scheduled(setting):
            yield Problem(
                "routing_losses", f"{name}: a controller moves this coefficient; give it a number to start from."
            )
        elif name == "l1_sparsity" and coefficient_at(setting, 0, 1) == 0:
            yield Problem(
                "routing_losses", f"{name}: the controller multiplies the coefficient, so it never leaves 0; set 1e-8."
            )


def _of_parts(config: Config, needs: frozenset[str]) -> Iterator[str]:
    """What of a layer is recorded must exist there."""
    kind = ROUTERS[config.router]
    if "rows" in needs and (kind is None or not kind.has_rows):
        yield f"compares the router's rows, one for each expert, and router={config.router!r} has none."
    if "token_sums" in needs:
        inside = config.router == "cosine" and config.router_dim
        if config.router not in _ROWS_OF_INPUT or inside:
            yield (
                "compares the router's rows with the input, so both need the same size; set router="
                + " or ".join(map(repr, _ROWS_OF_INPUT))
                + ", without router_dim."
            )
        if config.router_input != "module" or config.router_level != "token":
            yield "reads the input of each linear; set router_input='module' and router_level='token'."
    if needs & {"columns", "down", "up"}:
        layouts = ("separate",) if "down" in needs else ("separate", "shared_A")
        if config.expert_layout not in layouts or config.num_splits > 1:
            yield f"needs experts with matrices of their own; set expert_layout={' or '.join(map(repr, layouts))}."
        if config.router_sharing in ("input", "block", "model") or config.expert_scope == "ffn":
            yield "would reach only the first of the linears that decide together; set router_sharing='none'."
    by_row = config.router_level == "sequence" or not reads(config.router) & {"input", "hidden", "state"}
    if "columns" in needs and by_row:
        yield "compares the experts' outputs for one token, and a decision here is about a whole row."
    if "rows" in needs and config.freeze_router:
        yield "moves the router's rows, and freeze_router=True keeps them."
    if "down" in needs and config.freeze_A:
        yield "moves A, and freeze_A=True keeps it; set target: B."


def _of_shares(config: Config, name: str) -> Iterator[str]:
    if config.gate == "identity" and name in _OF_SHARES:
        yield "takes shares of probability, and weights of gate='identity' have any sign; set another gate."


def _load(config: Config, options: dict[str, Any]) -> Iterator[str]:
    scheduled = config.routing_schedules.get("router_noise")
    if config.selection != "top_k" or not (config.router_noise or scheduled):
        yield "is about noisy top-k routing; set selection='top_k' and router_noise above 0."


def _load_balancing(config: Config, options: dict[str, Any]) -> Iterator[str]:
    if options.get("scope") == "global" and options.get("count") == "first":
        yield "scope='global' counts every selected expert; leave `count` out, or set another scope."
    if config.selection == "dense" and config.gate not in EXACT_ZEROS and options.get("count") != "first":
        yield (
            "balances selections, and selection='dense' selects every expert alike, so it teaches nothing; set "
            "`importance` or `batch_entropy` instead."
        )


def _l1_sparsity(config: Config, options: dict[str, Any]) -> Iterator[str]:
    if config.selection not in ("dense", "threshold"):
        yield (
            f"counts the experts whose gate is above zero, and selection={config.selection!r} keeps others too; set "
            "selection='dense'."
        )
    if config.null_experts:
        yield "a ReLU gate needs no null experts to leave some out; set null_experts=0."
    if config.gate != "relu":
        yield f"needs weights that can be exactly zero; set gate='relu', not {config.gate!r}."
    fewest = fewest_experts(config)
    if options.get("experts_per_token", 2) >= fewest:
        yield f"experts_per_token must be below num_experts, {fewest}; got {options.get('experts_per_token', 2)!r}."


def _router_z(config: Config, options: dict[str, Any]) -> Iterator[str]:
    if config.logit_norm is not None:
        yield "normalised logits are bounded already; leave it or logit_norm out."


def _localized_balancing(config: Config, options: dict[str, Any]) -> Iterator[str]:
    groups = options.get("groups", 2)
    counts = config.num_experts if isinstance(config.num_experts, list) else [config.num_experts]
    if any(count % groups for count in counts):
        yield f"cuts the experts into {groups} equal groups, which num_experts={config.num_experts} does not allow."


def _expert_orthogonality(config: Config, options: dict[str, Any]) -> Iterator[str]:
    if options.get("target") == "output" and config.selection == "top_k" and config.top_k == 1:
        yield "compares the selected experts of a token with one another, and top_k=1 selects one; set 2 or more."


def _expert_contrastive(config: Config, options: dict[str, Any]) -> Iterator[str]:
    every = config.selection == "top_k" and (config.top_k or 2) == config.num_experts and not config.null_experts
    if every or (config.selection == "dense" and config.gate not in EXACT_ZEROS):
        yield "compares selected experts with those left out, and none is left out."
    if config.selection == "top_k" and config.top_k == 1:
        yield "compares the selected experts of a token with one another, and top_k=1 selects one; set 2 or more."


def _gate_contrastive(config: Config, options: dict[str, Any]) -> Iterator[str]:
    if options.get("positives", "view") == "view":
        if reads(config.router) != {"input"} or config.router_input != "module":
            yield f"makes a second view of the input, which router={config.router!r} does not read alone."
        if config.router_sharing in ("input", "block", "model") or config.selection == "sparsemixer":
            yield "makes no second view of a decision that is shared or sampled; set positives: task."


def _consistency(config: Config, options: dict[str, Any]) -> Iterator[str]:
    random = (
        config.router_noise,
        config.router_jitter,
        config.expert_dropout,
        config.lora_dropout,
        config.routing_schedules.get("router_noise"),
        config.routing_schedules.get("expert_dropout"),
        config.gate in _NOISY_GATES,
        config.router == "domain",
    )
    if not any(random):
        yield (
            "compares two forward passes, which only differ where routing is random; set expert_dropout, "
            "router_noise, router_jitter or lora_dropout."
        )


_CHECKS = {
    "load_balancing": _load_balancing,
    "load": _load,
    "l1_sparsity": _l1_sparsity,
    "router_z": _router_z,
    "localized_balancing": _localized_balancing,
    "expert_orthogonality": _expert_orthogonality,
    "expert_contrastive": _expert_contrastive,
    "gate_contrastive": _gate_contrastive,
    "consistency": _consistency,
}
"""Conditions of single losses: from the config and the loss's options to sentences about what is wrong."""
