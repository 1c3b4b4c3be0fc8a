"""One plain LoRA per expert, or per task: exact, as what is lost is the gate between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from molora.errors import MergeError, MoloraError
from molora.plain.fixed import Fixed, fixed_factors, layers_of
from molora.plain.lora import PlainLora

GROUP_OF_SINGLES = 8
"""Experts of rank 1 in one LoRA, unless said otherwise: servers hold tens of adapters, not hundreds."""


@dataclass(frozen=True)
class ExpertLora:
    """Some experts with weight 1 each.

    Attributes:
        name: `expert_3`, `experts_8-15`, or `shared_expert_0`.
        experts: Their places in the bank.
        lora: Them as a plain LoRA.
    """

    name: str
    experts: tuple[int, ...]
    lora: PlainLora


@torch.no_grad()
def expert_loras(
    model: nn.Module, adapter_name: str = "default", group_size: int | None = None
) -> Iterator[ExpertLora]:
    """Take a mixture apart: each expert as the LoRA it is alone, at its own scale.

    Args:
        model: A model with the adapter.
        adapter_name: Its name.
        group_size: Experts in one LoRA; default 1, and 8 where all experts have rank 1.

    Yields:
        Routed experts in their order, then shared ones. A linear where none of a group's experts has a rank is left
        out, and so is a group without any. Plain LoRAs beside the mixture, such as MixLoRA's on attention, belong to
        every expert and go into each.

    Raises:
        MergeError: If an expert alone is no linear map of the input.
        MoloraError: If modules have different numbers of experts, or `group_size` is below 1.
    """
    layers = layers_of(model, adapter_name)
    plans = {name: layer.molora_plan[adapter_name] for name, layer in layers.items()}
    _check(layers, adapter_name)
    mixtures = [plan for plan in plans.values() if plan.router != "none"]
    counts = {(plan.num_experts, plan.bank_experts) for plan in mixtures} or {(1, 1)}
    if len(counts) > 1:
        numbers = ", ".join(str(routed) for routed, _ in sorted(counts))
        raise MoloraError(
            f"modules have {numbers} experts; only adapters with the same number everywhere can be split."
        )
    [(routed, total)] = counts
    if group_size is None:
        singles = all(set(plan.ranks) == {1} for plan in mixtures)
        group_size = GROUP_OF_SINGLES if singles else 1
    if group_size < 1:
        raise MoloraError(f"got group_size={group_size}; must be at least 1.")
    for experts in [*_runs(range(routed), group_size), *_runs(range(routed, total), group_size)]:
        factors = {}
        for name, layer in layers.items():
            down, up = layer.folded(adapter_name, _chosen(plans[name], experts))
            if len(down):
                factors[name] = (down, up)
        if not factors:
            continue  # they have no ranks anywhere, as `molora prune` leaves them
        yield ExpertLora(_name(experts, routed), experts, PlainLora(factors, {}, _is_transposed(layers)))


def task_loras(model: nn.Module, num_tasks: int, adapter_name: str = "default") -> Iterator[tuple[int, PlainLora]]:
    """One exact plain LoRA per task, for routers that read nothing but the task.

    Args:
        model: A model with the adapter.
        num_tasks: Tasks the router knows.
        adapter_name: Name of the adapter.

    Raises:
        MergeError: If mixing weights depend on anything else.
    """
    transposed = _is_transposed(layers_of(model, adapter_name))
    for task in range(num_tasks):
        yield task, PlainLora(fixed_factors(model, adapter_name, Fixed(task=task)), {}, transposed)


def gate_tensors(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """What the experts alone lack: routers, thresholds and biases, by their names in the checkpoint."""
    kept = {}
    for name, layer in layers_of(model, adapter_name).items():
        for part in ("molora_router", "molora_threshold", "molora_blend", "molora_bias"):
            container = getattr(layer, part)
            if adapter_name in container:
                for key, value in container[adapter_name].state_dict().items():
                    kept[f"base_model.model.{name}.{part}.{key}"] = value.detach().cpu().contiguous()
    return kept


def _check(layers: dict[str, Any], adapter_name: str) -> None:
    for name, layer in layers.items():
        plan = layer.molora_plan[adapter_name]
        nonlinear = plan.activation is not None or plan.after or layer._has_bias(adapter_name)
        if not hasattr(layer, "folded") or nonlinear:
            raise MergeError(
                f"an expert of adapter {adapter_name!r} at {name} is no linear map of its input, so it cannot be a "
                "LoRA. The nearest one can: `molora export DIR OUT --as lora --calibrate data.jsonl`."
            )


def _runs(experts: Sequence[int], size: int) -> list[tuple[int, ...]]:
    return [tuple(experts[start : start + size]) for start in range(0, len(experts), size)]


def _name(experts: tuple[int, ...], routed: int) -> str:
    prefix, first, last = ("expert", experts[0], experts[-1])
    if first >= routed:
        prefix, first, last = "shared_expert", first - routed, last - routed
    return f"{prefix}_{first}" if first == last else f"{prefix}s_{first}-{last}"


def _chosen(plan: Any, experts: tuple[int, ...]) -> Tensor | None:
    """Weight 1 for the chosen experts; a module without mixture counts fully."""
    if plan.router == "none":
        return None
    weights = torch.zeros(plan.bank_experts)
    weights[list(experts)] = 1
    return weights.expand(plan.num_splits, -1) if plan.num_splits > 1 else weights


def _is_transposed(layers: dict[str, Any]) -> bool:
    return any(layer.fan_in_fan_out for layer in layers.values())
