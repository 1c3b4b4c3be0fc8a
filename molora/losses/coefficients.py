"""How much a loss counts: a number, a schedule over the training, or what a controller makes of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from molora.routing.schedules import problems_of_one, scheduled_value

ALLOWED = "a number of at least 0"


def settings_of(setting: float | Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Split an entry of `routing_losses` into its coefficient and its options."""
    if not isinstance(setting, Mapping):
        return setting, {}
    options = dict(setting)
    return options.pop("coefficient", None), options


def coefficient_problem(value: Any) -> str | None:
    """Say what is wrong with a coefficient, as a sentence, or `None`."""
    if isinstance(value, Mapping):
        problems = list(problems_of_one(value, _is_coefficient, ALLOWED))
        return None if not problems else "coefficient." + " coefficient.".join(problems)
    if _is_coefficient(value):
        return None
    return (
        f"got {value!r}; must be a coefficient of at least 0, or a mapping with `coefficient` and options, where the "
        "coefficient is a number or a schedule such as {start: 0, end: 0.01, until: 0.1}."
    )


def coefficient_at(setting: float | Mapping[str, Any], step: int, steps: int) -> float:
    """The coefficient of an entry of `routing_losses` during one step; before any controller.

    Args:
        setting: The entry.
        step: The step that runs, from 0.
        steps: All steps of the training.
    """
    coefficient, _ = settings_of(setting)
    if isinstance(coefficient, Mapping):
        return float(scheduled_value("coefficient", coefficient, step, steps))
    return float(coefficient)


def is_scheduled(setting: float | Mapping[str, Any]) -> bool:
    """Whether the coefficient of an entry changes over the training."""
    return isinstance(settings_of(setting)[0], Mapping)


def _is_coefficient(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
