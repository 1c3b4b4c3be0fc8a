"""Routing losses: pure functions of recorded routing decisions, chosen by name in `routing_losses`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from molora.losses.load_balancing import load_balancing
from molora.routing.record import RoutingRecord


@dataclass(frozen=True)
class RoutingLoss:
    """A loss that can be named in the config.

    Attributes:
        of_record: The loss of one linear's record and the options given, a scalar in fp32.
        options: Option names and the values each may take; the first is the default.
    """

    of_record: Callable[..., Tensor]
    options: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


def _load_balancing(record: RoutingRecord, **options: Any) -> Tensor:
    return load_balancing(record.routing.probabilities, record.routing.selected, record.mask, **options)


LOSSES: dict[str, RoutingLoss] = {
    "load_balancing": RoutingLoss(_load_balancing, {"scope": ("sequence", "batch")}),
}


def total_loss(
    records: Iterable[RoutingRecord], losses: Mapping[str, float | Mapping[str, Any]]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Add up the losses of a config over the records of one micro-batch.

    Each loss is averaged over the records, that is over linears, so a coefficient means the same whatever the number
    of adapted linears.

    Args:
        records: At least one.
        losses: `routing_losses` of the config: name to coefficient, or to a mapping with `coefficient` and options.

    Returns:
        The weighted sum to add to the task loss, and each loss unweighted and detached, for the log.
    """
    records = list(records)
    total, values = torch.zeros((), device=records[0].routing.logits.device), {}
    for name, setting in losses.items():
        options = dict(setting) if isinstance(setting, Mapping) else {"coefficient": setting}
        coefficient = options.pop("coefficient")
        value = torch.stack([LOSSES[name].of_record(record, **options) for record in records]).mean()
        total = total + coefficient * value
        values[name] = value.detach()
    return total, values


__all__ = ["LOSSES", "RoutingLoss", "load_balancing", "total_loss"]
