"""Names of linears, short enough for a picture."""

from __future__ import annotations

from collections.abc import Sequence

from molora.parameters import module_kind


def in_order(name: str) -> list[tuple[int, str]]:
    """Key to sort names of linears by, in which layer 2 comes before layer 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def shortened(names: Sequence[str]) -> list[str]:
    """Names without the dotted beginning that all of them share."""
    if len(names) < 2:
        return list(names)
    parts = [name.split(".") for name in names]
    least = min(map(len, parts)) - 1
    same = next((at for at in range(least) if len({part[at] for part in parts}) > 1), least)
    return [".".join(part[same:]) for part in parts]


def by_kind(names: Sequence[str]) -> dict[str, list[tuple[int, str]]]:
    """Indices of linears by what they are called, each with the numbers in its name, or all of it if they clash."""
    groups: dict[str, list[tuple[int, str]]] = {}
    for index, name in enumerate(names):
        numbers = ".".join(part for part in name.split(".") if part.isdecimal())
        groups.setdefault(module_kind(name), []).append((index, numbers or "·"))
    for kind, own in groups.items():
        if len({label for _, label in own}) < len(own):
            whole = shortened([names[index] for index, _ in own])
            groups[kind] = [(index, label) for (index, _), label in zip(own, whole, strict=True)]
    return groups
