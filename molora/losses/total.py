"""The sum of all losses of a config over one micro-batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from molora.errors import MoloraError
from molora.losses.coefficients import coefficient_at, settings_of
from molora.losses.registry import LAYER_REDUCTION, LOSSES, NO_INPUTS, TASK_IDS, LossInputs, loss_needs
from molora.routing.stacked import StackedRouting

Coefficients = Mapping[str, float | Mapping[str, float]]
"""Of each loss: one number, or one for each linear by name."""


def total_loss(
    stacks: Sequence[StackedRouting],
    losses: Mapping[str, float | Mapping[str, Any]],
    inputs: LossInputs = NO_INPUTS,
    coefficients: Coefficients | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Add up the losses of a config over the decisions of one micro-batch.

    Each loss is averaged over linears, so a coefficient means the same whatever their number, unless its
    `layer_reduction` is `"sum"`. `consistency`, which compares outputs of the model, is not among them.

    Args:
        stacks: The recorded decisions, at least one.
        losses: `routing_losses` of the config: name to coefficient, or to a mapping with `coefficient` and options.
        inputs: What else losses read.
        coefficients: Those of this step, where they change: by a schedule, or by a controller. Default: those of the
            config, schedules at their end.

    Returns:
        The weighted sum to add to the task loss, and each loss unweighted and detached, for the log.

    Raises:
        MoloraError: If a loss needs task ids that are not given, or that do not fit the rows.
    """
    linears = sum(len(stack.layers) for stack in stacks)  # once for each forward pass
    distinct = len({layer for stack in stacks for layer in stack.layers})
    total = stacks[0].probabilities.new_zeros(())
    values: dict[str, Tensor] = {}
    for name, setting in losses.items():
        of_routing = LOSSES[name].of_routing
        if of_routing is None:
            continue
        _, options = settings_of(setting)
        whole = linears / distinct if options.pop(LAYER_REDUCTION, "mean") == "sum" else linears
        options = {option: value for option, value in options.items() if option not in LOSSES[name].controlled}
        coefficient = (coefficients or {}).get(name, coefficient_at(setting, 0, 1))
        plain = total.new_zeros(())
        for stack in stacks:
            given = inputs
            if TASK_IDS in loss_needs(name, setting):
                given = replace(inputs, task_ids=_tasks_of(stack, name, inputs.task_ids))
            value = of_routing(stack, given, **options)  # [L]
            total = total + (value * _weight(coefficient, stack, value)).sum().to(total.device) / whole
            plain = plain + value.detach().sum().to(total.device) / whole
        values[name] = plain
    return total, values


def _weight(coefficient: float | Mapping[str, float], stack: StackedRouting, like: Tensor) -> float | Tensor:
    if not isinstance(coefficient, Mapping):
        return coefficient
    return torch.tensor([coefficient[layer] for layer in stack.layers], dtype=like.dtype, device=like.device)


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
            f"{rows} rows, and task_ids has shape {tuple(task_ids.shape)}. Linears that see tokens without their row "
            "have no task."
        )
    return task_ids.to(stack.probabilities.device)
