"""Growing and shrinking a mixture: add experts, drop experts, freeze routers. Between trainings, never in forward."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from molora.bank import MoLoraLayer
from molora.config import MoLoraConfig
from molora.errors import MoloraError
from molora.groups import RoutingGroup
from molora.imported import LORAS
from molora.plan import ModulePlan, plan_module
from molora.siblings import SharedInput
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
    if freeze_existing and (config.shared_experts or not isinstance(config.num_experts, int)):
        raise MoloraError(
            "freeze_existing needs the same number of experts everywhere and no shared ones; "
            "pass freeze_existing=False."
        )
    fields: dict[str, Any] = {"r": _grown_rank(config, n, r)}
    if isinstance(config.num_experts, int):
        fields["num_experts"] = config.num_experts + n
    else:
        fields["num_experts"] = [number + n for number in config.num_experts]
    if freeze_existing:
        fields["frozen_experts"] = config.num_experts
    if not _keeps_old_outputs(config):
        warnings.warn(
            f"the new experts of {adapter_name!r} share a {config.gate} gate, a {config.selection} selection or a "
            "normalisation with the old ones, so outputs change before any training.",
            UserWarning,
            stacklevel=2,
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
    fields: dict[str, Any] = {
        "num_experts": len(kept),
        "frozen_experts": sum(index < config.frozen_experts for index in kept),
    }
    if isinstance(config.r, list):
        fields["r"] = [config.r[index] for index in kept] + config.r[config.num_experts :]
    if config.imported_experts is not None:
        known = config.imported_experts
        fields["imported_experts"] = [known[index] for index in kept if index < len(known)]
    _rebuild(model, adapter_name, fields, lambda plan: list(kept))


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
        old, others = _Snapshot(layer, adapter_name), _parameters_of_others(layer, adapter_name)
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


class _Snapshot:
    """The values one module holds for an adapter, to be put into a larger or smaller one."""

    def __init__(self, layer: MoLoraLayer, name: str) -> None:
        self.plan: ModulePlan = layer.molora_plan[name]
        self.group = layer.molora_group.get(name)
        self.reads = layer.molora_input.get(name)
        self.before = layer.molora_before.get(name)
        self.matrices = [matrix.detach().clone() for matrix in layer.matrices(name)]
        self.bias = _bank_bias(layer, name)
        parts = ("molora_router", "molora_threshold", "molora_blend", "molora_bias")
        self.parts = {part: getattr(layer, part)[name] for part in parts if name in getattr(layer, part)}

    def restore(self, layer: MoLoraLayer, name: str, order: Sequence[int | None]) -> None:
        """Copy what is kept; `order` names for each routed expert the old one it was, or `None` for a fresh one."""
        shared = range(self.plan.num_experts, self.plan.bank_experts)
        self._restore_dtypes(layer, name)
        self._restore_bank(layer, name, [*order, *shared])
        nulls = range(self.plan.num_experts, self.plan.num_experts + self.plan.spec.null_experts)
        for part, old in self.parts.items():
            new = getattr(layer, part)[name]
            sized = old.by_expert() if part == "molora_router" else {}
            if part == "molora_bias":
                sized = {"weight": (old.weight.data, 0)}
            targets = new.by_expert() if part == "molora_router" else {"weight": (new.weight.data, 0)} if sized else {}
            for key, value in old.named_parameters():
                if key in sized:
                    _take(targets[key][0], sized[key][0], sized[key][1], [*order, *nulls])
                else:
                    dict(new.named_parameters())[key].data.copy_(value)

    def _restore_dtypes(self, layer: MoLoraLayer, name: str) -> None:
        """New parts come in the dtype of the base layer, and trained ones are often kept in a finer one."""
        for downs, ups, _ in layer.banks(name):
            downs.to(self.matrices[0].dtype)
            ups.to(self.matrices[1].dtype)
        for part, old in self.parts.items():
            for parameter in old.parameters():
                getattr(layer, part)[name].to(parameter.dtype)

    def _restore_bank(self, layer: MoLoraLayer, name: str, order: Sequence[int | None]) -> None:
        rows = _rank_order(self.plan, layer.molora_plan[name], order)
        start = 0
        for downs, ups, _ in layer.banks(name):
            size = ups.weight.shape[1]
            part = rows[start : start + size]
            if self.plan.layout == "shared_A":
                downs.weight.copy_(self.matrices[0])
            else:
                _take(downs.weight.data, self.matrices[0], 0, part)
            _take(ups.weight.data, self.matrices[1], 1, part)
            if self.bias is not None:
                _take(downs.bias.data, self.bias, 0, part)
            start += size


def _bank_bias(layer: MoLoraLayer, name: str) -> Tensor | None:
    biases = [downs.bias for downs, _, _ in layer.banks(name) if downs.bias is not None]
    return torch.cat([bias.detach().clone() for bias in biases]) if biases else None


def _rank_order(old: ModulePlan, new: ModulePlan, order: Sequence[int | None]) -> list[int | None]:
    """For each rank of the new bank the old rank it was, or `None`."""
    starts = [sum(old.ranks[:expert]) for expert in range(old.bank_experts)]
    ranks: list[int | None] = []
    for expert, rank in zip(order, new.ranks, strict=True):
        ranks += [None] * rank if expert is None else [*range(starts[expert], starts[expert] + rank)]
    return ranks


def _take(target: Tensor, source: Tensor, dim: int, order: Sequence[int | None]) -> None:
    """Copy the parts of `source` that `order` names into `target`, both along `dim`."""
    places = [place for place, origin in enumerate(order) if origin is not None]
    origins = [origin for origin in order if origin is not None]
    if places:
        index = torch.tensor(places, device=target.device)
        values = source.index_select(dim, torch.tensor(origins, device=source.device)).to(target)
        target.index_copy_(dim, index, values)
