"""What slimming did to an adapter, module by module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from molora.slim.adapter import Adapter


@dataclass
class ModuleChange:
    """What was done to one module.

    Attributes:
        removed: Indices of the experts, or of the ranks, that are gone.
        groups: Experts that became one, by their old indices; empty unless experts were merged.
        rank_before: Ranks of all its experts together.
        rank_after: The same now.
        parameters_before: Numbers it held, its router included.
        parameters_after: The same now.
        mass_removed: Share of the gate's weight that went to what was removed; `None` without calibration.
        error: Relative squared error of its output on held-out rows; `None` if not measured.
    """

    removed: list[int] = field(default_factory=list)
    groups: list[list[int]] = field(default_factory=list)
    rank_before: int = 0
    rank_after: int = 0
    parameters_before: int = 0
    parameters_after: int = 0
    mass_removed: float | None = None
    error: float | None = None


@dataclass
class Slimmed:
    """A smaller adapter, and what was done.

    Attributes:
        adapter: The adapter.
        operation: What was done, in words.
        options: With which numbers.
        modules: The change of each adapted module, by its full name.
        exact: Whether the new adapter computes the same as the old one on the calibration data, as far as can be told
            without running it; `None` if that depends on the data.
        notes: What else to know.
    """

    adapter: Adapter
    operation: str
    options: dict[str, Any]
    modules: dict[str, ModuleChange]
    exact: bool | None = None
    notes: list[str] = field(default_factory=list)


def compared(
    old: Adapter,
    new: Adapter,
    removed: Mapping[str, Sequence[int]] | None = None,
    masses: Mapping[str, float] | None = None,
    groups: Mapping[str, Sequence[Sequence[int]]] | None = None,
) -> dict[str, ModuleChange]:
    """The change of every module.

    Args:
        old: The adapter before.
        new: The adapter after.
        removed: What is gone from each module.
        masses: Share of the gate's weight that went there.
        groups: Experts that became one.
    """
    changes = {}
    for module in old.modules:
        changes[module] = ModuleChange(
            list((removed or {}).get(module, ())),
            [list(group) for group in (groups or {}).get(module, ())],
            sum(old.plan(module).ranks),
            sum(new.plan(module).ranks),
            old.parameters(module),
            new.parameters(module),
            (masses or {}).get(module),
        )
    return changes
