"""Where a gate is fixed, by itself or by a task, scores or a prompt, a mixture is exactly one plain LoRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from molora.bank import MoLoraLayer
from molora.decide import Products, decide
from molora.errors import MoloraError
from molora.fold import Factors
from molora.merging import cannot_merge
from molora.modes import evaluating
from molora.plan import ModulePlan
from molora.routing.inputs import routing_inputs
from molora.routing.scope import RoutingCall, RoutingInputs
from molora.watch import Seen, watching


@dataclass(frozen=True)
class Fixed:
    """What the gates of an adapter are fixed by.

    Attributes:
        task: Id of the task, for routers that read it.
        expert_scores: A number per expert, for routing that reads them.
        prompt: Ids of one prompt, `[S]` or `[1, S]`, for routers that decide once per sequence: what they decide about
            it holds for everything that follows it.
    """

    task: int | None = None
    expert_scores: Sequence[float] | None = None
    prompt: Tensor | None = None

    def inputs(self) -> dict[str, Any]:
        """As `routing_inputs` takes them."""
        given = {}
        if self.task is not None:
            given["task_ids"] = torch.tensor([self.task])
        if self.expert_scores is not None:
            given["expert_scores"] = torch.tensor([list(self.expert_scores)])
        return given

    def settles(self, plan: ModulePlan) -> bool:
        """Whether the weights of a module are known with this."""
        by_given = ("task" not in plan.reads or self.task is not None) and (
            "scores" not in plan.reads or self.expert_scores is not None
        )
        by_prompt = not plan.reads & {"input", "hidden", "state"} or (plan.per_sequence and self.prompt is not None)
        return plan.is_constant or (by_given and by_prompt)


def layers_of(model: nn.Module, adapter_name: str) -> dict[str, Any]:
    """The modules with an adapter, by their full names in the base model.

    Raises:
        MoloraError: If there are none.
    """
    layers = {
        module.module_key: module
        for module in model.modules()
        if isinstance(module, MoLoraLayer) and module.has_adapter(adapter_name)
    }
    if not layers:
        known = sorted({name for m in model.modules() if isinstance(m, MoLoraLayer) for name in m.molora_plan})
        raise MoloraError(f"the model has no molora adapter {adapter_name!r}; it has {', '.join(known) or 'none'}.")
    return layers


@torch.no_grad()
def fixed_factors(model: nn.Module, adapter_name: str, fixed: Fixed | None = None) -> dict[str, Factors]:
    """The plain LoRA that an adapter exactly is.

    Args:
        model: A model with the adapter, active if a prompt is given.
        adapter_name: Its name.
        fixed: What its gates are fixed by, if they read something.

    Returns:
        For each adapted linear, by its full name in the base model, A `[r, in]` and B `[out, r]`, the scale in B.

    Raises:
        MergeError: If a gate depends on more than what is given, or the experts are not linear.
        MoloraError: If there is no such task, or scores of the wrong number.
    """
    fixed = fixed or Fixed()
    layers = layers_of(model, adapter_name)
    for layer in layers.values():
        plan = layer.molora_plan[adapter_name]
        is_linear = hasattr(layer, "folded") and layer.is_linear_map(adapter_name)
        if not is_linear or not fixed.settles(plan):
            raise cannot_merge(adapter_name, plan.reads, plan.per_sequence, is_linear)
        if "task" in plan.reads and not 0 <= (fixed.task or 0) < plan.num_tasks:
            raise MoloraError(f"got task {fixed.task}; adapter {adapter_name!r} knows 0 to {plan.num_tasks - 1}.")
    # Routers draw noise in training.
    with evaluating(model):
        decided = _by_prompt(model, layers, adapter_name, fixed) if fixed.prompt is not None else {}
        return {key: _factors(model, layer, adapter_name, fixed, decided.get(key)) for key, layer in layers.items()}


def _factors(model: nn.Module, layer: Any, adapter_name: str, fixed: Fixed, decided: Tensor | None) -> Factors:
    """The plain LoRA of one module, by what was decided about the prompt, if anything was."""
    plan = layer.molora_plan[adapter_name]
    if plan.is_constant:
        found: Factors = layer.constant_factors(adapter_name)
        return found
    if plan.reads & {"input", "hidden", "state"}:
        if decided is None:
            raise MoloraError(
                f"adapter {adapter_name!r} decides by the prompt and did not run on it; make it the active adapter, "
                "unmerged and enabled, and give a prompt that every module sees."
            )
        found = layer.folded(adapter_name, decided)
        return found
    found = layer.folded(adapter_name, _by_inputs(model, layer, adapter_name, fixed))
    return found


def _by_inputs(model: nn.Module, layer: Any, adapter_name: str, fixed: Fixed) -> Tensor:
    """Weights `[E]`, or `[splits, E]`, of a module whose router reads only what is given."""
    plan = layer.molora_plan[adapter_name]
    device = layer.matrices(adapter_name)[0].device
    x = torch.zeros(1, 1, layer.in_features, device=device)
    hidden = torch.zeros(1, 1, sum(plan.ranks), device=device)
    given: dict[str, Any] = fixed.inputs()
    call = RoutingCall(RoutingInputs(**given), batch=1)
    with routing_inputs(model, **given), layer.routing_scope.running(call):  # the first one checks them
        routing = decide(layer, adapter_name, x, Products(hidden), None)
    assert routing is not None
    return _one(routing.weights, plan)


def _by_prompt(model: nn.Module, layers: Mapping[str, Any], adapter_name: str, fixed: Fixed) -> dict[str, Tensor]:
    """Weights of every module after one forward pass over the prompt."""
    assert fixed.prompt is not None
    if fixed.prompt.ndim > 2 or (fixed.prompt.ndim == 2 and len(fixed.prompt) != 1):
        raise MoloraError(f"got prompts of shape {list(fixed.prompt.shape)}; give the ids of one, [S] or [1, S].")
    ids = fixed.prompt.reshape(1, -1)
    found: dict[str, Tensor] = {}

    def note(layer: Any, name: str, seen: Seen) -> None:
        if name == adapter_name and seen.weights is not None:
            found[layer.module_key] = _one(seen.weights, layer.molora_plan[name])

    block = routing_inputs(model, **fixed.inputs(), generating=True)
    with watching(layers.values(), note), block:
        model(input_ids=ids.to(next(model.parameters()).device))
    return found


def _one(weights: Tensor, plan: ModulePlan) -> Tensor:
    """The one decision in `[1, 1, E]`, `[1, E]` or, with splits, `[1, 1, splits, E]`."""
    last = 2 if plan.num_splits > 1 else 1
    return weights.flatten(0, -last - 1)[0] if weights.ndim > last else weights
