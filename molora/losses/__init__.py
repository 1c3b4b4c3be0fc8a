"""Routing losses: pure functions of recorded routing decisions, chosen by name in `routing_losses`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from molora.errors import MoloraError, did_you_mean
from molora.losses.importance import importance
from molora.losses.load_balancing import load_balancing
from molora.losses.localized_balancing import localized_balancing
from molora.losses.mutual_information import mutual_information
from molora.losses.options import Choice, Number, Option
from molora.losses.parameter_penalty import parameter_penalty
from molora.losses.router_entropy import router_entropy
from molora.losses.router_z import router_z
from molora.routing.record import StackedRouting

LAYER_REDUCTION = "layer_reduction"
"""Option of every loss: `"mean"` over linears, or their `"sum"`, which some papers take."""


@dataclass(frozen=True)
class RoutingLoss:
    """A loss that can be named in the config.

    Attributes:
        of_routing: The loss, a mean over linears, of stacked decisions, the tasks of their rows `[B]` if it needs
            them, and the options given; a scalar in fp32.
        options: Option names and what each may be.
        needs_task_ids: Whether it compares the rows by task.
    """

    of_routing: Callable[..., Tensor]
    options: Mapping[str, Option]
    needs_task_ids: bool = False


def _load_balancing(routing: StackedRouting, **options: Any) -> Tensor:
    return load_balancing(
        routing.probabilities, routing.selected, routing.mask, null_experts=routing.null_experts, **options
    )


def _localized_balancing(routing: StackedRouting, task_ids: Tensor, **options: Any) -> Tensor:
    probabilities = routing.probabilities[..., : routing.num_experts]  # null experts are in no group
    return localized_balancing(probabilities, task_ids, routing.mask, **options)


def _mutual_information(routing: StackedRouting, task_ids: Tensor, **options: Any) -> Tensor:
    return mutual_information(routing.probabilities, task_ids, routing.mask, **options)


def _parameter_penalty(routing: StackedRouting, **options: Any) -> Tensor:
    return parameter_penalty(routing.probabilities, routing.selected, routing.sizes, routing.mask, **options)


def _router_entropy(routing: StackedRouting, **options: Any) -> Tensor:
    return router_entropy(routing.probabilities, routing.mask, **options)


def _importance(routing: StackedRouting, **options: Any) -> Tensor:
    weights = routing.weights[..., : routing.num_experts]  # shared experts behind them are not chosen
    return importance(weights, routing.mask, **options)


def _router_z(routing: StackedRouting, **options: Any) -> Tensor:
    return router_z(routing.logits, routing.mask, **options)


def _loss(of_routing: Callable[..., Tensor], needs_task_ids: bool = False, **options: Option) -> RoutingLoss:
    return RoutingLoss(of_routing, {**options, LAYER_REDUCTION: Choice(("mean", "sum"))}, needs_task_ids)


_SCOPE = Choice(("sequence", "batch"))

LOSSES: dict[str, RoutingLoss] = {
    "load_balancing": _loss(_load_balancing, scope=_SCOPE, count=Choice(("selected", "first"))),
    "localized_balancing": _loss(
        _localized_balancing,
        needs_task_ids=True,
        delta=Number(0.1, 0, 1),
        form=Choice(("cv2", "variance_over_mean")),
        groups=Number(2, 1, integer=True),
    ),
    "mutual_information": _loss(_mutual_information, needs_task_ids=True),
    "parameter_penalty": _loss(_parameter_penalty, scope=_SCOPE),
    "router_entropy": _loss(_router_entropy),
    "importance": _loss(_importance),
    "router_z": _loss(_router_z),
}


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


def total_loss(
    stacks: Sequence[StackedRouting],
    losses: Mapping[str, float | Mapping[str, Any]],
    task_ids: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Add up the losses of a config over the decisions of one micro-batch.

    Each loss is averaged over linears, so a coefficient means the same whatever their number, unless its
    `layer_reduction` is `"sum"`.

    Args:
        stacks: The recorded decisions, at least one.
        losses: `routing_losses` of the config: name to coefficient, or to a mapping with `coefficient` and options.
        task_ids: The task of each row of the batch, `[B]`; needed by some losses.

    Returns:
        The weighted sum to add to the task loss, and each loss unweighted and detached, for the log.

    Raises:
        MoloraError: If a loss needs task ids that are not given, or that do not fit the rows.
    """
    linears = sum(len(stack.layers) for stack in stacks)
    zero = stacks[0].probabilities.new_zeros(())
    total, values = zero, {}
    for name, setting in losses.items():
        options = dict(setting) if isinstance(setting, Mapping) else {"coefficient": setting}
        coefficient = options.pop("coefficient")
        whole = 1 if options.pop(LAYER_REDUCTION, "mean") == "sum" else linears
        value = zero
        for stack in stacks:
            given = {"task_ids": _tasks_of(stack, name, task_ids)} if LOSSES[name].needs_task_ids else {}
            value = value + LOSSES[name].of_routing(stack, **given, **options) * (len(stack.layers) / whole)
        total = total + coefficient * value
        values[name] = value.detach()
    return total, values


def _tasks_of(stack: StackedRouting, name: str, task_ids: Tensor | None) -> Tensor:
    if task_ids is None:
        raise MoloraError(
            f"routing loss {name!r} compares rows by task and got no task ids; pass a task_ids column in the dataset, "
            "one integer per row from 0."
        )
    rows = stack.probabilities.shape[1]
    if task_ids.shape != (rows,):
        raise MoloraError(
            f"routing loss {name!r} needs one task id per row: the routing decisions of {stack.layers[0]!r} are about "
            f"{rows} rows, and task_ids has shape {tuple(task_ids.shape)}. Packed rows, and linears that see tokens "
            "without their row, have no task."
        )
    return task_ids.to(stack.probabilities.device)


__all__ = [
    "LAYER_REDUCTION",
    "LOSSES",
    "Choice",
    "Number",
    "RoutingLoss",
    "importance",
    "load_balancing",
    "localized_balancing",
    "mutual_information",
    "option_problem",
    "parameter_penalty",
    "router_entropy",
    "router_z",
    "total_loss",
]
