"""Let experts that do alike become one, on what they add: MC-SMoE (arXiv 2310.01334) for mixtures of LoRAs.

The authors merge whole feed-forward experts, whose hidden units have to be aligned first. Of a LoRA only the product
`B A` counts, so products are averaged: their factors side by side are the sum exactly, and its singular values give
the best expert of the rank wanted. Groups come from average linkage instead of the authors' dominant experts, so that
twins always meet.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from molora.config import MoLoraConfig
from molora.errors import ConfigError, Problem
from molora.lifecycle import start_fields
from molora.plan import routing_spec
from molora.routing import SUMS_TO_ONE
from molora.slim.adapter import PREFIX, Adapter
from molora.slim.changes import Slimmed, compared
from molora.slim.experts import Expert, experts_of, rebuilt
from molora.slim.prune import Usage
from molora.slim.refusals import MERGE, check_slimming, check_smaller
from molora.slim.rerank import root_of, starts_of, truncated, whitening
from molora.slim.routers import rerouted
from molora.slim.similarity import groups_of, similarity

Groups = list[list[int]]
_MASS_ADDS_UP = ("softmax", "gumbel_softmax")
"""Gates under which the logit of all members together is the logarithm of their summed exponentials."""


def merge_experts(adapter: Adapter, number: int, usage: Usage | None = None) -> Slimmed:
    """Make groups of similar experts one expert each.

    Experts are alike if their probabilities rise and fall together over the calibration tokens, or without those if
    their rows of the router point the same way. What the one adds is the mean of what its members add, weighted by how
    much each is used, as the best matrix of their rank; its row of the router is their mean likewise. Under a softmax
    its logit makes up for the members it stands for. Where the experts' weights do not depend on each other it adds
    what all members add. Modules that share a router are grouped alike.

    Args:
        adapter: The adapter.
        number: Routed experts that are left in every module.
        usage: Its statistics on calibration data; with second moments, the lower rank is the best for such inputs.

    Raises:
        ConfigError: If experts of this adapter cannot be merged, there are not that many, or the result is impossible,
            such as fewer experts than `top_k`.
    """
    check_slimming(adapter.config, MERGE)
    check_number(adapter, number)
    experts, groups_at, shares_at = experts_of(adapter), {}, {}
    for holder, members in adapter.routing_groups().items():
        fewest = adapter.plan(holder).num_experts
        seen = None if usage is None else [usage[module] for module in members]
        groups = groups_of(similarity(adapter, holder, members, experts, seen), number)
        used = torch.ones(fewest, dtype=torch.float64)
        if seen is not None:
            used = torch.stack([one.mean_weight[:fewest] for one in seen]).mean(dim=0)
        for module in members:
            groups_at[module], shares_at[module] = groups, [_shares(used, group) for group in groups]
    merged = {
        module: _merged_bank(adapter, own, groups_at[module], shares_at[module], usage, module)
        if module in groups_at
        else own
        for module, own in experts.items()
    }
    tensors, fields = _rerouted(adapter, groups_at, shares_at)
    new = rebuilt(Adapter(adapter.config, tensors), merged, **fields, **_fields(adapter.config, number))
    slim = Slimmed(new, "experts merged", {"merge_to": number}, compared(adapter, new, groups=groups_at))
    _annotate(slim, adapter.config, bool(fields))
    return slim


def check_number(adapter: Adapter, number: int) -> None:
    """Refuse a number of experts that cannot be left.

    Raises:
        ConfigError: If some module has fewer, or the other choices of the config do not allow it.
    """
    for holder in adapter.routing_groups():
        fewest = adapter.plan(holder).num_experts
        if not 1 <= number <= fewest:
            message = f"got {number}; {holder} has {fewest} experts, so it must be from 1 to {fewest}."
            raise ConfigError([Problem("merge_to", message)], "cannot merge experts of this adapter")
    check_smaller(adapter.config, number)


def _shares(used: Tensor, group: Sequence[int]) -> Tensor:
    """Share of each member in the use of its group; even if nobody used any."""
    own = used[list(group)]
    return own / own.sum() if float(own.sum()) else torch.full_like(own, 1 / len(own))


def _merged_bank(
    adapter: Adapter, own: Sequence[Expert], groups: Groups, shares: Sequence[Tensor], usage: Usage | None, module: str
) -> list[Expert]:
    white, starts = whitening(None if usage is None else usage[module]), starts_of(own)
    shared = adapter.plan(module).num_experts
    adds_up = not _compete(adapter.config)
    one_a = adapter.config.expert_layout == "shared_A"
    merged = []
    for group, share in zip(groups, shares, strict=True):
        factors = (share * len(group) if adds_up else share).tolist()
        members = [own[index] for index in group]
        root = None if one_a else root_of(white, members, [starts[index] for index in group])
        merged.append(merged_expert(members, factors, one_a, root))
    return [*merged, *own[shared:]]


def merged_expert(members: Sequence[Expert], factors: Sequence[float], one_a: bool, root: Tensor | None) -> Expert:
    """One expert that adds `Σ factor · scale · B A` of its members, at the highest of their ranks.

    Args:
        members: The experts.
        factors: How much each counts.
        one_a: They share A, so the sum has their rank anyway.
        root: As in `truncated`, for the members side by side.
    """
    if len(members) == 1:
        return members[0]
    ups = [member.up.double() * (factor * member.scale) for member, factor in zip(members, factors, strict=True)]
    if one_a:
        return Expert(members[0].down, torch.stack(ups).sum(dim=0), 1.0, members[0].bias)
    every = Expert(torch.cat([member.down for member in members]), torch.cat(ups, dim=1), 1.0)
    rank = max(member.rank for member in members)
    return truncated(every, rank, root) if every.rank > rank else every


def _compete(config: MoLoraConfig) -> bool:
    """Whether an expert's weight depends on which others there are."""
    spec = routing_spec(config)
    return (
        spec.gate in SUMS_TO_ONE
        or spec.renormalize
        or spec.selection == "sparsemixer"
        or spec.weights in ("selected_softmax",)
    )


def _mass_adds_up(config: MoLoraConfig) -> bool:
    """Whether a logit can stand for several experts."""
    exponential = config.gate in _MASS_ADDS_UP or config.selection == "sparsemixer"
    return exponential and config.logit_norm is None


def _rerouted(
    adapter: Adapter, groups_at: dict[str, Groups], shares_at: dict[str, list[Tensor]]
) -> tuple[dict[str, Tensor], dict[str, bool]]:
    """The tensors with one logit a group, and the field that gives logits a bias if they need one now."""
    config = adapter.config
    adds = _mass_adds_up(config)
    level = config.temperature if config.selection != "sparsemixer" else 1.0

    def joined(module: str, name: str, value: Tensor, dim: int) -> Tensor:
        groups, number = groups_at[module], sum(map(len, groups_at[module]))
        wide = value.double().movedim(dim, 0)
        parts = []
        for group, share in zip(groups, shares_at[module], strict=True):
            rows = wide[group]
            if adds and name == "weight" and config.router in ("static", "table"):
                parts.append(torch.logsumexp(rows / level, dim=0) * level)  # the logits themselves
                continue
            if config.router == "arrow":
                rows = rows * _towards_first(rows)
            mean = torch.tensordot(share, rows, dims=1)
            parts.append(mean + level * math.log(len(group)) if adds and name == "bias" else mean)
        return torch.stack([*parts, *wide[number:]]).movedim(0, dim)

    tensors = rerouted(adapter, joined)
    if not adds or config.router not in ("linear", "task") or config.router_bias or _all_single(groups_at):
        return tensors, {}
    for module in adapter.modules:
        if adapter.tensor(module, "molora_router.weight") is not None:
            logits = tensors[f"{PREFIX}{module}.molora_router.weight"]
            masses = [level * math.log(len(group)) for group in groups_at[module]]
            nulls = [0.0] * (len(logits) - len(masses))
            bias = torch.tensor(masses + nulls, dtype=logits.dtype)
            tensors[f"{PREFIX}{module}.molora_router.bias"] = bias
    return tensors, {"router_bias": True}


def _all_single(groups_at: dict[str, Groups]) -> bool:
    return all(len(group) == 1 for groups in groups_at.values() for group in groups)


def _towards_first(rows: Tensor) -> Tensor:
    """Signs that make rows, whose sign means nothing, point the same way, `[n, 1]`."""
    signs = torch.sign(rows @ rows[0])
    return torch.where(signs == 0, 1.0, signs).unsqueeze(-1)


def _fields(config: MoLoraConfig, number: int) -> dict[str, object]:
    """What else of the config follows. Merged experts come from nowhere, and are frozen only if all were."""
    routed = config.num_experts if isinstance(config.num_experts, int) else min(config.num_experts)
    all_frozen = bool(config.frozen_experts) and config.frozen_experts == routed + config.shared_experts
    frozen = number + config.shared_experts if all_frozen else 0
    return {"num_experts": number, "imported_experts": None, "frozen_experts": frozen, **start_fields(config, number)}


def _merges(slim: Slimmed) -> bool:
    return any(len(group) > 1 for change in slim.modules.values() for group in change.groups)


def _annotate(slim: Slimmed, config: MoLoraConfig, new_bias: bool) -> None:
    adds = _mass_adds_up(config)
    if new_bias:
        slim.notes.append("The router has a bias now: the logarithm of how many experts each one stands for.")
    elif adds and config.router not in ("linear", "task", "mlp", "normalized", "static", "table"):
        slim.notes.append(f"router={config.router!r} has no bias, so a merged expert gets the weight of one.")
    elif config.logit_norm is not None and _merges(slim):
        slim.notes.append("logit_norm looks at all logits, of which there are fewer now, so all weights change.")
    elif not adds and _compete(config) and _merges(slim):
        slim.notes.append("Weights are made to sum to one, and a merged expert counts as one there: others get more.")
    if config.frozen_experts and not slim.adapter.config.frozen_experts:
        slim.notes.append("No expert is frozen any more: frozen and trained ones may have become one.")
    if config.selection != "dense":
        slim.notes.append(f"selection={config.selection!r} chooses among fewer experts now, so other ones are chosen.")
