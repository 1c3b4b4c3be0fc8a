"""The losses by name: from recorded decisions to the pure functions, with what each needs and may be told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from molora.errors import did_you_mean
from molora.losses.batch_entropy import batch_entropy
from molora.losses.expert_contrastive import expert_contrastive
from molora.losses.expert_orthogonality import expert_orthogonality, output_orthogonality
from molora.losses.gate_contrastive import gate_contrastive
from molora.losses.importance import importance
from molora.losses.l1_sparsity import l1_sparsity
from molora.losses.load import load
from molora.losses.load_balancing import load_balancing
from molora.losses.localized_balancing import localized_balancing
from molora.losses.mutual_information import mutual_information
from molora.losses.options import Choice, Group, Number, Option
from molora.losses.parameter_penalty import parameter_penalty
from molora.losses.router_entropy import router_entropy
from molora.losses.router_orthogonality import router_orthogonality
from molora.losses.router_z import router_z
from molora.losses.routing_contrastive import routing_contrastive
from molora.routing.stacked import StackedRouting

LAYER_REDUCTION = "layer_reduction"
"""Option of every loss of linears: `"mean"` over them, or their `"sum"`, which some papers take."""

TASK_IDS, LOGITS = "task_ids", "logits"
"""Needs that no layer meets: the task of each row, and the logits of a second forward pass."""


@dataclass(frozen=True)
class LossInputs:
    """What losses may read beside the recorded decisions.

    Attributes:
        task_ids: The task of each row of the batch, or of each packed example, `[B]`.
        counts: Selections of each expert of a linear by all processes since the last optimizer step,
            `[E + null_experts]`, by the linear's name.
        tokens: Mean number per process of real tokens in a forward pass of this micro-batch, by the linear's name.
        noise: Standard deviation of the noise on the logits.
    """

    task_ids: Tensor | None = None
    counts: Mapping[str, Tensor] = field(default_factory=dict)
    tokens: Mapping[str, Tensor] = field(default_factory=dict)
    noise: float = 0.0


NO_INPUTS = LossInputs()
Options = Mapping[str, Any]


@dataclass(frozen=True)
class RoutingLoss:
    """A loss that can be named in the config.

    Attributes:
        of_routing: From stacked decisions, inputs and the options given to one value per linear, `[L]`; `None` for
            the loss that compares outputs of the model.
        options: Option names and what each may be.
        needs: From the options given to what must be recorded or passed: names of `LayerParts`, `task_ids`, `logits`.
        controlled: Options that steer the coefficient, and not the loss.
    """

    of_routing: Callable[..., Tensor] | None
    options: Mapping[str, Option]
    needs: Callable[[Options], frozenset[str]] = lambda options: frozenset()
    controlled: frozenset[str] = frozenset()


def _load_balancing(routing: StackedRouting, inputs: LossInputs, **options: Any) -> Tensor:
    if options.get("scope") == "global" and all(layer in inputs.counts for layer in routing.layers):
        options["counts"] = _of_layers(inputs.counts, routing)
        options["tokens"] = _of_layers(inputs.tokens, routing)
    return load_balancing(
        routing.probabilities, routing.selected, routing.mask, null_experts=routing.null_experts, **options
    )


def _of_layers(values: Mapping[str, Tensor], routing: StackedRouting) -> Tensor:
    return torch.stack([values[layer] for layer in routing.layers]).to(routing.probabilities.device)


def _localized_balancing(routing: StackedRouting, inputs: LossInputs, **options: Any) -> Tensor:
    assert inputs.task_ids is not None  # total_loss refuses to go on without
    return localized_balancing(_true(routing, routing.probabilities), inputs.task_ids, routing.mask, **options)


def _mutual_information(routing: StackedRouting, inputs: LossInputs, **options: Any) -> Tensor:
    assert inputs.task_ids is not None  # total_loss refuses to go on without
    return mutual_information(routing.probabilities, inputs.task_ids, routing.mask, **options)


def _parameter_penalty(routing: StackedRouting, inputs: LossInputs, **options: Any) -> Tensor:
    return parameter_penalty(routing.probabilities, routing.selected, routing.sizes, routing.mask, **options)


def _router_entropy(routing: StackedRouting, inputs: LossInputs, **options: Any) -> Tensor:
    return router_entropy(routing.probabilities, routing.mask, **options)


def _batch_entropy(routing: StackedRouting, inputs: LossInputs, **options: Any) -> Tensor:
    return batch_entropy(routing.probabilities, routing.mask, **options)


def _importance(routing: StackedRouting, inputs: LossInputs, **options: Any) -> Tensor:
    return importance(_true(routing, routing.weights), routing.mask, **options)  # shared experts are not chosen


def _load(routing: StackedRouting, inputs: LossInputs, **options: Any) -> Tensor:
    return load(routing.clean_logits, routing.logits, routing.selected, inputs.noise, routing.mask, **options)


def _router_z(routing: StackedRouting, inputs: LossInputs, **options: Any) -> Tensor:
    return router_z(routing.logits, routing.mask, **options)


def _l1_sparsity(routing: StackedRouting, inputs: LossInputs, **options: Any) -> Tensor:
    options.setdefault("experts_per_token", 2)
    return l1_sparsity(routing.probabilities, routing.selected, mask=routing.mask, **options)


def _routing_contrastive(routing: StackedRouting, inputs: LossInputs, **options: Any) -> Tensor:
    return routing_contrastive(
        routing.part("rows"), routing.part("token_sums"), routing.part("token_counts"), **options
    )


def _expert_contrastive(routing: StackedRouting, inputs: LossInputs, **options: Any) -> Tensor:
    return expert_contrastive(*_outputs(routing), **options)


def _gate_contrastive(routing: StackedRouting, inputs: LossInputs, **options: Any) -> Tensor:
    options.pop("mask_ratio", None)
    if options.pop("positives", "view") == "task":
        return gate_contrastive(routing.probabilities, routing.mask, task_ids=inputs.task_ids, **options)
    return gate_contrastive(routing.probabilities, routing.mask, view=routing.view, **options)


def _expert_orthogonality(routing: StackedRouting, inputs: LossInputs, **options: Any) -> Tensor:
    target = options.pop("target", "A")
    if target == "output":
        return output_orthogonality(*_outputs(routing), **options)
    matrix = routing.part("down") if target == "A" else routing.part("up").transpose(-1, -2)
    options.pop("max_tokens", None)
    return expert_orthogonality(matrix[:, : sum(routing.sizes)], _experts(routing), routing.num_experts)


def _router_orthogonality(routing: StackedRouting, inputs: LossInputs, **options: Any) -> Tensor:
    return router_orthogonality(routing.part("rows"), **options)


def _true(routing: StackedRouting, values: Tensor) -> Tensor:
    """The columns of routed experts, without null and shared ones."""
    return values[..., : routing.num_experts]


def _experts(routing: StackedRouting) -> Tensor:
    experts = routing.parts[0].experts
    assert experts is not None
    return experts[: sum(routing.sizes)]  # shared experts stand behind the routed ones


def _outputs(routing: StackedRouting) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """What tells the outputs of the routed experts: hidden, B, selection, experts of columns, and mask, by token."""
    routed = sum(routing.sizes)
    mask = None if routing.mask is None else routing.mask.flatten()
    return (
        routing.columns[..., :routed].flatten(1, 2),
        routing.part("up")[..., :routed],
        _true(routing, routing.selected).flatten(1, 2),
        _experts(routing),
        mask,
    )


def _always(*needs: str) -> Callable[[Options], frozenset[str]]:
    return lambda options: frozenset(needs)


def _needs_of_orthogonality(options: Options) -> frozenset[str]:
    by_target = {"A": {"down"}, "B": {"up"}, "output": {"columns", "up"}}
    return frozenset(by_target[options.get("target", "A")])


def _needs_of_gates(options: Options) -> frozenset[str]:
    return frozenset({TASK_IDS} if options.get("positives", "view") == "task" else ())


def _loss(
    of_routing: Callable[..., Tensor],
    needs: Callable[[Options], frozenset[str]] = lambda options: frozenset(),
    controlled: frozenset[str] = frozenset(),
    **options: Option,
) -> RoutingLoss:
    return RoutingLoss(of_routing, {**options, LAYER_REDUCTION: Choice(("mean", "sum"))}, needs, controlled)


_SCOPE = Choice(("sequence", "batch"))
_TEMPERATURE = Number(0.1, 1e-4)
_TOKENS = Number(256, 1, integer=True)
ADAPTIVE = Group(
    {
        "factor": Number(0.2, 0),
        "maximum": Number(0.01, 0),
        "decay": Number(0.99, 0, 1),
        "capacity": Number(1.0, 0),
    }
)
"""Coefficients of one linear each, which follow how much it is out of balance (Skywork-MoE)."""

LOSSES: dict[str, RoutingLoss] = {
    "load_balancing": _loss(
        _load_balancing,
        controlled=frozenset({"adaptive"}),
        scope=Choice(("sequence", "batch", "global")),
        count=Choice(("selected", "first")),
        adaptive=ADAPTIVE,
    ),
    "localized_balancing": _loss(
        _localized_balancing,
        _always(TASK_IDS),
        delta=Number(0.1, 0, 1),
        form=Choice(("cv2", "variance_over_mean")),
        groups=Number(2, 1, integer=True),
    ),
    "mutual_information": _loss(_mutual_information, _always(TASK_IDS)),
    "parameter_penalty": _loss(_parameter_penalty, scope=_SCOPE),
    "router_entropy": _loss(_router_entropy),
    "batch_entropy": _loss(_batch_entropy),
    "importance": _loss(_importance),
    "load": _loss(_load),
    "router_z": _loss(_router_z),
    "l1_sparsity": _loss(
        _l1_sparsity, controlled=frozenset({"alpha"}), experts_per_token=Number(2, 0.01), alpha=Number(1.2, 1)
    ),
    "routing_contrastive": _loss(_routing_contrastive, _always("rows", "token_sums"), temperature=Number(0.07, 1e-4)),
    "expert_contrastive": _loss(
        _expert_contrastive, _always("columns", "up"), temperature=_TEMPERATURE, max_tokens=_TOKENS
    ),
    "gate_contrastive": _loss(
        _gate_contrastive,
        _needs_of_gates,
        positives=Choice(("view", "task")),
        mask_ratio=Number(0.2, 0.01, 0.99),
        temperature=_TEMPERATURE,
    ),
    "expert_orthogonality": _loss(
        _expert_orthogonality,
        _needs_of_orthogonality,
        target=Choice(("A", "B", "output")),
        max_tokens=_TOKENS,
    ),
    "router_orthogonality": _loss(_router_orthogonality, _always("rows")),
    "consistency": RoutingLoss(None, {"max_tokens": _TOKENS}, _always(LOGITS)),
}


def loss_needs(name: str, setting: Any) -> frozenset[str]:
    """What a loss must be given beside decisions: names of `LayerParts`, `task_ids`, or `logits`.

    Args:
        name: A name in `LOSSES`.
        setting: Its entry in `routing_losses`.
    """
    return LOSSES[name].needs(setting if isinstance(setting, Mapping) else {})


def option_problem(name: str, option: str, value: Any) -> str | None:
    """Say what is wrong with an option of a loss, as a sentence, or `None`.

    Args:
        name: A name in `LOSSES`.
        option: Name of the option; the coefficient is none.
        value: Its value.
    """
    allowed = LOSSES[name].options
    if option not in allowed:
        names = ["coefficient", *sorted(allowed)]
        return f"{name}: unknown option {option!r}; allowed are {', '.join(names)}." + did_you_mean(option, names)
    problem = allowed[option].problem(value)
    return None if problem is None else f"{name}.{option}: {problem}"
