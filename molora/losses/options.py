"""Options of a loss: what values each may take."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from molora.errors import one_of


@dataclass(frozen=True)
class Choice:
    """An option that names one of several ways.

    Attributes:
        allowed: What it may be; the first is the default.
    """

    allowed: tuple[str, ...]

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value, as a sentence, or `None`."""
        return None if value in self.allowed else one_of(value, self.allowed)


@dataclass(frozen=True)
class Number:
    """An option that is a number.

    Attributes:
        default: Its value if none is given.
        low: Smallest value.
        high: Largest value.
        integer: Whether it must be a whole number.
    """

    default: float
    low: float = -math.inf
    high: float = math.inf
    integer: bool = False

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value, as a sentence, or `None`."""
        kinds = int if self.integer else (int, float)
        fits = isinstance(value, kinds) and not isinstance(value, bool) and self.low <= value <= self.high
        if fits and math.isfinite(value):
            return None
        kind = "an integer" if self.integer else "a number"
        if math.isinf(self.high):
            return f"got {value!r}; must be {kind} of at least {self.low:g}."
        return f"got {value!r}; must be {kind} from {self.low:g} to {self.high:g}."


@dataclass(frozen=True)
class Group:
    """An option that switches something on, with numbers of its own.

    Attributes:
        numbers: What each of them may be.
    """

    numbers: Mapping[str, Number]

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value, as a sentence, or `None`."""
        if isinstance(value, bool):
            return None
        if not isinstance(value, Mapping):
            return f"got {value!r}; must be true, or a mapping with any of {', '.join(self.numbers)}."
        for name, number in value.items():
            if name not in self.numbers:
                return one_of(name, self.numbers)
            problem = self.numbers[name].problem(number)
            if problem is not None:
                return f"{name}: {problem}"
        return None

    def given(self, value: Any) -> dict[str, float] | None:
        """All numbers, defaults filled in; `None` if it is not switched on."""
        if not value and not isinstance(value, Mapping):
            return None
        own = value if isinstance(value, Mapping) else {}
        return {name: own.get(name, number.default) for name, number in self.numbers.items()}


Option = Choice | Number | Group
