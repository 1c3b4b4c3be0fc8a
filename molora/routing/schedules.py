"""Schedules: routing choices that change over the course of training. Pure functions of the share of it that is over.

A schedule is a mapping: `{"start": 8, "end": 2, "shape": "linear", "until": 0.5}` goes from 8 to 2 over the first half
of all steps and stays there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from molora.errors import did_you_mean, one_of


def _linear(start: float, end: float, progress: float) -> float:
    return start + (end - start) * progress


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def _exponential(start: float, end: float, progress: float) -> float:
    return float(start * (end / start) ** progress)


SHAPES: dict[str, Callable[[float, float, float], float]] = {
    "linear": _linear,
    "cosine": _cosine,
    "exponential": _exponential,
}
"""Ways from the start to the end; the first is the default. `exponential` changes by the same factor every step."""

KEYS = ("start", "end", "shape", "until")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 < value <= 1


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_scale(value: Any) -> bool:
    return _is_number(value) and value >= 0


def _is_rate(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 1


SCHEDULED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "top_k": (_is_count, "an integer from 1"),
    "top_p": (_is_share, "a number in (0, 1]"),
    "temperature": (_is_positive, "a number above 0"),
    "threshold": (_is_share, "a number in (0, 1]"),
    "router_noise": (_is_scale, "a number of at least 0"),
    "expert_dropout": (_is_rate, "a number in [0, 1)"),
}
"""The fields that may have a schedule, what values they take, and how to say so."""


def scheduled_value(field: str, schedule: Mapping[str, Any], step: int, steps: int) -> float | int:
    """The value of a scheduled field during one step.

    Args:
        field: A name in `SCHEDULED`; `top_k` is rounded to a whole number, halves upwards.
        schedule: A mapping without problems.
        step: The step that runs, from 0.
        steps: All steps of the training.

    Returns:
        The start at step 0; the end from the last step of the first `until` of all steps.
    """
    lasts = max(1, math.ceil(schedule.get("until", 1.0) * steps - 1e-9))  # 0.1 of 30 is 3
    progress = min(1.0, step / (lasts - 1)) if lasts > 1 else 1.0
    start, end = schedule["start"], schedule["end"]
    if progress == 1.0:
        return end  # exactly, which the shapes are up to rounding
    value = SHAPES[schedule.get("shape", "linear")](start, end, progress)
    return math.floor(value + 0.5) if field == "top_k" else value


def schedule_problems(schedules: Any) -> Iterator[str]:
    """Sentences about what is wrong with the schedules of a config.

    Args:
        schedules: Field name to schedule.
    """
    if not isinstance(schedules, Mapping):
        yield f"got {schedules!r}; must map names of fields to schedules such as {{'start': 8, 'end': 2}}."
        return
    for field, schedule in schedules.items():
        if field not in SCHEDULED:
            yield f"{one_of(field, SCHEDULED)} Other fields have no schedule."
        elif not isinstance(schedule, Mapping):
            yield f"{field}: got {schedule!r}; must be a mapping with {', '.join(KEYS)}."
        else:
            for problem in problems_of_one(schedule, *SCHEDULED[field]):
                yield f"{field}.{problem}"


def problems_of_one(schedule: Mapping[str, Any], fits: Callable[[Any], bool], allowed: str) -> Iterator[str]:
    """Sentences about what is wrong with one schedule.

    Args:
        schedule: The mapping.
        fits: Whether a value may be its start or end.
        allowed: How to say so.
    """
    for key in schedule:
        if key not in KEYS:
            yield f"{key}: is no part of a schedule; allowed are {', '.join(KEYS)}.{did_you_mean(key, KEYS)}"
    for key in ("start", "end"):
        if key not in schedule:
            yield f"{key}: is missing; give {allowed}."
        elif not fits(schedule[key]):
            yield f"{key}: got {schedule[key]!r}; must be {allowed}."
    shape = schedule.get("shape", "linear")
    if shape not in SHAPES:
        yield f"shape: {one_of(shape, SHAPES)}"
    elif shape == "exponential" and 0 in (schedule.get("start"), schedule.get("end")):
        yield "shape: 'exponential' never reaches or leaves 0; use 'linear' or 'cosine', or a small number."
    if not _is_share(schedule.get("until", 1.0)):
        yield f"until: got {schedule['until']!r}; must be a share of all steps, in (0, 1]."
