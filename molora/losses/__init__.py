"""Routing losses: pure functions of recorded routing decisions, chosen by name in `routing_losses`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from molora.losses.load_balancing import load_balancing
from molora.routing.record import StackedRouting


@dataclass(frozen=True)
class RoutingLoss:
    """A loss that can be named in the config.

    Attributes:
        of_routing: The loss, a mean over linears, of stacked decisions and the options given; a scalar in fp32.
        options: Option names and the values each may take; the first is the default.
    """

    of_routing: Callable[..., Tensor]
    options: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


def _load_balancing(routing: StackedRouting, **options: Any) -> Tensor:
    return load_balancing(routing.probabilities, routing.selected, routing.mask, **options)


LOSSES: dict[str, RoutingLoss] = {
    "load_balancing": RoutingLoss(_load_balancing, {"scope": ("sequence", "batch")}),
}


def total_loss(
    stacks: Sequence[StackedRouting], losses: Mapping[str, float | Mapping[str, Any]]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Add up the losses of a config over the decisions of one micro-batch.

    Each loss is averaged over linears, so a coefficient means the same whatever their number.

    Args:
        stacks: The recorded decisions, at least one.
        losses: `routing_losses` of the config: name to coefficient, or to a mapping with `coefficient` and options.

    Returns:
        The weighted sum to add to the task loss, and each loss unweighted and detached, for the log.
    """
    linears = sum(len(stack.layers) for stack in stacks)
    total, values = stacks[0].probabilities.new_zeros(()), {}
    for name, setting in losses.items():
        options = dict(setting) if isinstance(setting, Mapping) else {"coefficient": setting}
        coefficient = options.pop("coefficient")
        value = sum(
            (LOSSES[name].of_routing(stack, **options) * (len(stack.layers) / linears) for stack in stacks),
            start=torch.zeros_like(total),
        )
        total = total + coefficient * value
        values[name] = value.detach()
    return total, values


__all__ = ["LOSSES", "RoutingLoss", "load_balancing", "total_loss"]
