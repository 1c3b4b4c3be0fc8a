"""Errors molora raises for mistakes a user can correct: what was given, what is allowed, what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


class MoloraError(ValueError):
    """Base class of every error molora raises on purpose."""


@dataclass(frozen=True)
class Problem:
    """One mistake in a configuration.

    Attributes:
        field: Name of the field at fault; ``""`` when the mistake belongs to no single field.
        message: What was given, what is allowed and the closest match, in one sentence.
        where: ``file:line`` when the value was read from a file, otherwise ``""``.
    """

    field: str
    message: str
    where: str = ""

    def __str__(self) -> str:
        return ": ".join(part for part in (self.where, self.field, self.message) if part)


class ConfigError(MoloraError):
    """All mistakes found in one configuration, reported together.

    Attributes:
        problems: Every mistake, in the order found.
    """

    def __init__(self, problems: Sequence[Problem], title: str = "invalid configuration") -> None:
        self.problems = tuple(problems)
        super().__init__(title + ":" + "".join(f"\n  - {problem}" for problem in self.problems))


class TargetModulesError(MoloraError):
    """`target_modules` names something the model does not have."""


class MergeError(MoloraError):
    """The adapter has no single weight that could be merged into its base layer."""


class DataError(MoloraError):
    """A dataset cannot be used as it is: missing, empty, malformed, or nothing in it to learn from."""


def did_you_mean(given: object, allowed: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest allowed name, or ``""`` when nothing is close."""
    matches = difflib.get_close_matches(str(given), [str(name) for name in allowed], n=1, cutoff=0.6)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def one_of(given: object, allowed: Iterable[str]) -> str:
    """Return the message for a value outside a closed set of names."""
    names = list(allowed)
    return f"got {given!r}; allowed are {', '.join(map(repr, names))}.{did_you_mean(given, names)}"
