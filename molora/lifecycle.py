"""Growing and shrinking a mixture: add experts, drop experts, freeze routers. Between trainings, never in forward."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from molora.bank import MoLoraLayer
from molora.config import MoLoraConfig
from molora.errors import MoloraError
from molora.groups import RoutingGroup
from molora.imported import LORAS
from molora.plan import most_experts, plan_module
from molora.siblings import SharedInput
from molora.snapshot import Snapshot
from molora.targets import text_config

_INDEPENDENT_GATES = ("sigmoid", "relu", "relaxed_bernoulli", "identity")
_INDEPENDENT_SELECTIONS = ("dense", "threshold")


def add_experts(
    model: nn.Module,
    n: int,
    adapter_name: str = "default",
    freeze_existing: bool = True,
    r: int | None = None,
) -> None:
    """Append fresh experts to every adapted module, as a new task or domain arrives.

    New experts start with `B = 0`. Where each expert's weight depends on its own logit only (gates `sigmoid`, `relu`
    or `identity` without renormalisation, `selection` dense or threshold), the model's output stays exactly as it was;
    anywhere else the new experts compete with the old ones from the first token, and a warning says so. Parameters are
    replaced by larger ones: make optimizers and trainers afterwards.

    Args:
        model: A model with a molora adapter.
        n: How many to add.
        adapter_name: Which adapter grows.
        freeze_existing: Do not train the experts that are there any further.
        r: Rank of the new experts; by default that of the config, if it is one number.

    Raises:
        MoloraError: If the adapter is unknown or its layout has no experts of their own.
        ConfigError: If the grown adapter would be impossible.
    """
    config = _config(model, adapter_name)
    if n < 1:
        raise MoloraError(f"got n={n!r}; must be an integer of at least 1.")
    if config.expert_layout in ("pairs", "shards") or config.router == "none":
        raise MoloraError(f"expert_layout={config.expert_layout!r} with router={config.router!r} cannot grow.")
    _check_room(config, freeze_existing)
    fields: dict[str, Any] = {"r": _grown_rank(config, n, r), "rank_pattern": _grown_patterns(config, n, r)}
    if isinstance(config.num_experts, int):
        fields["num_experts"] = config.num_experts + n
    else:
        fields["num_experts"] = [number + n for number in config.num_experts]
    if freeze_existing:
        fields["frozen_experts"] = config.num_experts
    if not _keeps_old_outputs(config):
        warnings.warn(
            f"the new experts of {adapter_name!r} share a {config.gate} gate, a {config.selection} selection or a "
            "normalisation with the old ones, so outputs change before any training: train before you use it.",
            UserWarning,
            stacklevel=3,
        )
    _rebuild(model, adapter_name, fields, lambda plan: [*range(plan.num_experts), *[None] * n])


def drop_experts(model: nn.Module, experts: Iterable[int], adapter_name: str = "default") -> None:
    """Remove experts and their rows of the router; tokens that used them choose among the rest.

    Args:
        model: A model with a molora adapter.
        experts: Indices of the routed experts to remove, the same in every module.
        adapter_name: Which adapter shrinks.

    Raises:
        MoloraError: If an index is out of range, or the adapter's experts cannot be told apart.
        ConfigError: If the rest is impossible, such as fewer experts than `top_k`.
    """
    config = _config(model, adapter_name)
    dropped = sorted(set(experts))
    if not isinstance(config.num_experts, int) or config.expert_layout in ("pairs", "shards"):
        raise MoloraError("only adapters with the same number of experts everywhere can drop some.")
    outside = [index for index in dropped if not 0 <= index < config.num_experts]
    if outside or not dropped:
        raise MoloraError(f"got experts {outside or dropped}; must be indices from 0 to {config.num_experts - 1}.")
    kept = [index for index in range(config.num_experts) if index not in dropped]
    fields = fields_without(config, dropped)
    number = config.num_experts

    def rest(r: Any) -> Any:
        return [r[index] for index in kept] + r[number:] if isinstance(r, list) else r

    fields["r"] = rest(config.r)
    fields["rank_pattern"] = {name: rest(r) for name, r in config.rank_pattern.items()}
    _rebuild(model, adapter_name, fields, lambda plan: list(kept))


def fields_without(config: MoLoraConfig, experts: Iterable[int]) -> dict[str, Any]:
    """The fields of a config that lacks some of its routed experts, those of their ranks aside.

    Args:
        config: The config before.
        experts: Indices of the routed experts that go.
    """
    number, gone = most_experts(config.num_experts), set(experts)
    kept = [index for index in range(number) if index not in gone]
    frozen_shared = max(0, config.frozen_experts - number)
    fields: dict[str, Any] = {
        "num_experts": len(kept),
        "frozen_experts": sum(index < config.frozen_experts for index in kept) + frozen_shared,
    }
    if config.imported_experts is not None:
        known = config.imported_experts  # routed experts first, then shared ones
        left = [known[index] for index in kept if index < len(known)] + known[number:]
        fields["imported_experts"] = left or None
    return {**fields, **start_fields(config, len(kept))}


def start_fields(config: MoLoraConfig, number: int) -> dict[str, Any]:
    """The fields that only say how routers are trained and that so few experts do not allow, left out.

    Args:
        config: The config before.
        number: Routed experts that are left.
    """
    confidence, active = config.router_confidence, config.experts_per_token
    fields: dict[str, Any] = {}
    if confidence is not None and confidence <= 1 / (number + config.null_experts):
        fields["router_confidence"] = None
    if active is not None and active >= number:
        fields["experts_per_token"] = None
    return fields


def freeze_router(model: nn.Module, adapter_name: str = "default", frozen: bool = True) -> None:
    """Stop training an adapter's routers, or go on with it.

    Args:
        model: A model with a molora adapter.
        adapter_name: Whose routers.
        frozen: Whether they are frozen.
    """
    config = _config(model, adapter_name)
    config.freeze_router = frozen
    for layer in _layers(model, adapter_name):
        names = set(layer.frozen_peft_weight_names.get(adapter_name, ()))
        names = names | {"molora_router"} if frozen else names - {"molora_router"}
        layer.frozen_peft_weight_names = {**layer.frozen_peft_weight_names, adapter_name: tuple(sorted(names))}
        if adapter_name in layer.molora_router:
            trains = not frozen and adapter_name in layer.active_adapters
            layer.molora_router[adapter_name].requires_grad_(trains)


def _keeps_old_outputs(config: MoLoraConfig) -> bool:
    return (
        config.gate in _INDEPENDENT_GATES
        and config.selection in _INDEPENDENT_SELECTIONS
        and not config.renormalize
        and config.weights != "selected_softmax"
        and config.shared_weight == "one"
        and config.scale_by == "expert"
        and config.logit_norm is None
        and config.router != "unit_activation"
        and config.expert_layout != "factors"
        and config.expert_scope != "ffn"  # even an expert that does nothing adds the frozen block's answer
        and (config.selection == "dense" or config.threshold is not None)
    )


def _check_room(config: MoLoraConfig, freeze_existing: bool) -> None:
    """Refuse new experts that fields which count experts would take for shared ones."""
    if freeze_existing and (config.shared_experts or not isinstance(config.num_experts, int)):
        raise MoloraError(
            "freeze_existing needs the same number of experts everywhere and no shared ones, which would go on "
            "changing for old data too; pass freeze_existing=False, or train with shared_experts=0 what is to grow."
        )
    fewest = config.num_experts if isinstance(config.num_experts, int) else min(config.num_experts)
    known = len(config.imported_experts or ())
    if known > fewest:
        raise MoloraError(
            f"{known} experts are imported and {fewest} of them are routed, so new ones would take the place of "
            "shared ones; only adapters whose shared experts are not imported can grow."
        )
    if config.frozen_experts > fewest:
        raise MoloraError(
            f"frozen_experts={config.frozen_experts} reaches beyond the {fewest} routed experts, so new ones in their "
            f"place would be frozen; an adapter can grow with frozen_experts of at most {fewest}."
        )


def _grown_rank(config: MoLoraConfig, n: int, r: int | None) -> int | list[int]:
    if isinstance(config.r, list):
        if r is None:
            raise MoloraError("the experts have unequal ranks; pass `r`, the rank of the new ones.")
        routed = len(config.r) - config.shared_experts
        return config.r[:routed] + [r] * n + config.r[routed:]
    if r is None or r == config.r:
        return config.r
    if not isinstance(config.num_experts, int):
        raise MoloraError("with a list of num_experts new experts need the rank of the others; leave `r` out.")
    return [config.r] * config.num_experts + [r] * n + [config.r] * config.shared_experts


def _grown_patterns(config: MoLoraConfig, n: int, r: int | None) -> dict[str, Any]:
    """Patterns with the rank of each expert, where ranks differ; those of the new ones before the shared ones'."""
    grown: dict[str, Any] = dict(config.rank_pattern)
    for name, ranks in grown.items():
        if isinstance(ranks, list):
            rank = r if r is not None else config.r
            if not isinstance(rank, int):
                raise MoloraError("the experts have unequal ranks; pass `r`, the rank of the new ones.")
            routed = len(ranks) - config.shared_experts
            grown[name] = ranks[:routed] + [rank] * n + ranks[routed:]
        elif r is not None and r != ranks:
            if not isinstance(config.num_experts, int) or config.expert_scope == "ffn":
                where = "with a list of num_experts" if config.expert_scope != "ffn" else "inside whole blocks"
                raise MoloraError(
                    f"{where} new experts need the rank of the others, and rank_pattern[{name!r}] is {ranks}; leave "
                    "`r` out."
                )
            grown[name] = [ranks] * config.num_experts + [r] * n + [ranks] * config.shared_experts
    return grown


def _config(model: nn.Module, adapter_name: str) -> MoLoraConfig:
    known = getattr(model, "peft_config", {})
    config = known.get(adapter_name) if isinstance(known, dict) else None
    if not isinstance(config, MoLoraConfig):
        raise MoloraError(f"the model has no molora adapter {adapter_name!r}; it has {', '.join(known) or 'none'}.")
    return config


def _layers(model: nn.Module, adapter_name: str) -> list[MoLoraLayer]:
    return [m for m in model.modules() if isinstance(m, MoLoraLayer) and m.has_adapter(adapter_name)]


@torch.no_grad()
def _rebuild(model: nn.Module, adapter_name: str, fields: dict[str, Any], order_of: Any) -> None:
    """Build every module's part anew after `fields`, and put the old values where `order_of(old plan)` says."""
    config = _config(model, adapter_name)
    own = [entry.name for entry in dataclasses.fields(config) if entry.init]
    new = type(config)(**{**{name: getattr(config, name) for name in own}, **fields})  # raises if impossible
    num_layers = getattr(text_config(model), "num_hidden_layers", None)
    layers = [layer for layer in _layers(model, adapter_name) if layer.molora_plan[adapter_name].router != "none"]
    if any(adapter_name in layer.merged_adapters for layer in layers):
        raise MoloraError(f"adapter {adapter_name!r} is merged; unmerge it first.")
    start = copy.copy(new)
    start.init_weights = True  # new experts add nothing, however the first ones were drawn
    groups: dict[int, RoutingGroup] = {}
    inputs: dict[int, SharedInput] = {}
    for layer in layers:
        plan = layer.molora_plan[adapter_name]
        grown = plan_module(new, layer.module_key, num_layers, kind=(plan.position, plan.of_kind))
        old, others = Snapshot(layer, adapter_name), _parameters_of_others(layer, adapter_name)
        trained = [parameter.requires_grad for parameter in others]
        group = _successor(old.group, groups)
        reads = inputs.setdefault(id(old.reads), SharedInput()) if old.reads is not None else None
        layer.update_layer(adapter_name, start, grown, group, inference_mode=config.inference_mode, reads=reads)
        if old.before is not None:
            layer.molora_before[adapter_name] = old.before
        old.restore(layer, adapter_name, order_of(plan))
        for parameter, trains in zip(others, trained, strict=True):
            parameter.requires_grad_(trains)
    for name, value in fields.items():
        setattr(config, name, value)
    vars(config).pop(LORAS, None)  # they no longer are what the config says


def _parameters_of_others(layer: MoLoraLayer, adapter_name: str) -> list[nn.Parameter]:
    containers = [getattr(layer, name) for name in layer.adapter_layer_names]
    return [p for parts in containers for name in parts if name != adapter_name for p in parts[name].parameters()]


def _successor(group: RoutingGroup | None, groups: dict[int, RoutingGroup]) -> RoutingGroup | None:
    if group is None:
        return None
    if id(group) not in groups:
        groups[id(group)] = RoutingGroup(group.name, group.decides_once, group.feature_size, group.spans_ffn)
    return groups[id(group)]
