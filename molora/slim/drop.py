"""Remove experts from all modules, with their rows of the router: what only they knew is unlearned."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from molora.config import MoLoraConfig
from molora.errors import ConfigError, Problem
from molora.lifecycle import fields_without
from molora.plan import most_experts, routing_spec
from molora.routing.gates import EXACT_ZEROS, SUMS_TO_ONE
from molora.slim.adapter import Adapter
from molora.slim.changes import Slimmed, compared
from molora.slim.experts import experts_of, rebuilt
from molora.slim.prune import Usage
from molora.slim.refusals import DROP, check_slimming, check_smaller
from molora.slim.routers import rerouted

_BY_THEMSELVES = ("dense", "top_k", "top_k_magnitude", "threshold", "adaptive_threshold")
"""Selections in which one that is not selected can go without a change for the others, if weights allow it."""


def drop_experts(adapter: Adapter, experts: Iterable[int], usage: Usage | None = None) -> Slimmed:
    """Remove experts everywhere; tokens that used them choose among the rest.

    The same as `molora.lifecycle.drop_experts` does to a model, except that the others keep their scales also with
    `scale_by: total`.

    Args:
        adapter: The adapter.
        experts: Indices of the routed experts to remove.
        usage: Its statistics on calibration data, which say what is lost.

    Raises:
        ConfigError: If experts have no index of their own, an index is out of range, or the rest is impossible, such
            as fewer experts than `top_k`.
    """
    check_slimming(adapter.config, DROP)
    dropped, number = check_dropped(adapter.config, experts), most_experts(adapter.config.num_experts)
    kept = [index for index in range(number) if index not in dropped]
    own = {}
    for module, bank in experts_of(adapter).items():
        plain = adapter.plan(module).router == "none"
        own[module] = bank if plain else [bank[index] for index in [*kept, *range(number, len(bank))]]

    def chosen(module: str, name: str, value: Tensor, dim: int) -> Tensor:
        return value.index_select(dim, torch.tensor([*kept, *range(number, value.shape[dim])]))

    fields = fields_without(adapter.config, dropped)
    new = rebuilt(Adapter(adapter.config, rerouted(adapter, chosen)), own, **fields)
    routed = {module for module in adapter.modules if adapter.plan(module).router != "none"}
    masses = None if usage is None else {m: float(usage[m].mass(number)[dropped].sum()) for m in routed}
    slim = Slimmed(
        new, "experts dropped", {"drop": dropped}, compared(adapter, new, dict.fromkeys(routed, dropped), masses)
    )
    _judge(slim, adapter.config, usage, routed, dropped)
    return slim


def check_dropped(config: MoLoraConfig, experts: Iterable[int]) -> list[int]:
    """The indices of the experts to remove, in order.

    Raises:
        ConfigError: If an index is out of range, no expert would be left, or the rest is impossible.
    """
    dropped, number = sorted(set(experts)), most_experts(config.num_experts)
    outside = [index for index in dropped if not 0 <= index < number]
    if outside or not dropped or len(dropped) == number:
        given = outside or dropped
        message = f"got {given}; must be some of the experts 0 to {number - 1}, and not all of them."
        raise ConfigError([Problem("drop", message)], "cannot drop experts of this adapter")
    check_smaller(config, number - len(dropped))
    return dropped


def dropping_changes(config: MoLoraConfig) -> list[str]:
    """Why the weights of the others change when an expert goes that is never selected; empty if they do not."""
    spec, reasons = routing_spec(config), []
    if spec.selection not in _BY_THEMSELVES:
        reasons.append(f"selection={spec.selection!r} compares with all experts")
    # Sparsemax's zeros take no part; where all are kept, nothing else has no weight.
    sums = spec.gate in SUMS_TO_ONE and (spec.gate != "sparsemax" or spec.selection != "dense")
    normalised = spec.weights == "selected_softmax" or (spec.weights == "probability" and spec.renormalize)
    by_ratio = normalised and spec.gate != "sparsemax" and spec.selection not in ("threshold", "adaptive_threshold")
    if sums and not by_ratio:
        reasons.append(f"gate={spec.gate!r} shares its sum of one among all experts")
    for name in ("threshold", "max_threshold"):
        wanted = {"threshold": "threshold", "max_threshold": "adaptive_threshold"}[name]
        if spec.selection == wanted and getattr(config, name) is None:
            reasons.append(f"{name} is 1/num_experts")
    if spec.logit_norm is not None:
        reasons.append("logit_norm looks at all logits")
    if config.balance_bias_rate is not None and sums:
        reasons.append("experts are ranked by the balancing bias and by shares of all experts")
    if (lost := _lost_places(config)) is not None:
        reasons.append(lost)
    if config.router == "unit_activation":
        reasons.append("router='unit_activation' divides by the norm over all experts")
    return reasons


def _lost_places(config: MoLoraConfig) -> str | None:
    """How an expert may be among the top k and have no weight, so that another gets its place when it goes."""
    biased = config.balance_bias_rate is not None
    if config.selection == "top_k_magnitude" or (config.selection == "top_k" and biased):
        if config.min_logit is not None:
            return "an expert may be among the top k and below min_logit, and its place goes to the next one"
        if biased and config.gate in EXACT_ZEROS:
            return "an expert of probability zero may have a place by its balancing bias, which goes to the next one"
    return None


def _judge(slim: Slimmed, config: MoLoraConfig, usage: Usage | None, routed: set[str], dropped: list[int]) -> None:
    """Say whether the outputs stay the same."""
    reasons = dropping_changes(config)
    if usage is not None:
        slim.exact = not reasons and not any(float(usage[m].weight[dropped].sum()) for m in routed)
    if reasons:
        slim.exact = False
        slim.notes.append(f"The other experts' weights change, even where those were not used: {'; '.join(reasons)}.")
    else:
        slim.notes.append("Tokens that never selected the dropped experts are computed exactly as before.")
    if config.router == "external" or config.score_weight is not None or config.weights == "blend":
        slim.notes.append("`expert_scores` now has one number for each expert that is left, in their order.")
