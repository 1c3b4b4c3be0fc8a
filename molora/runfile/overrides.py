"""Overrides of a run file from the command line."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from molora.runfile.document import COMMAND_LINE, Document, KeyPath, dotted, parse_value

_ASSIGNMENT = re.compile(r"([A-Za-z_][A-Za-z0-9_.-]*)=(.*)", re.DOTALL)


def apply_overrides(document: Document, tokens: Sequence[str], is_switch: Callable[[str], bool]) -> None:
    """Set values of a document from command-line tokens; mistakes are noted in the document.

    `--key value`, `--key=value` and `key=value` are the same; `--key` alone is true where the key is a switch. Values
    are read as YAML. Dots reach into lists and mappings: `datasets.0.max_samples=10`.

    Args:
        document: The run file.
        tokens: What followed the file on the command line.
        is_switch: Whether a top-level key takes true or false.
    """
    seen: set[KeyPath] = set()
    for key, text in _split(document, tokens, is_switch):
        path = _path(key)
        if path in seen:
            document.report(path, "given twice on the command line.", COMMAND_LINE)
            continue
        seen.add(path)
        _set(document, path, text)


def _split(document: Document, tokens: Sequence[str], is_switch: Callable[[str], bool]) -> list[tuple[str, str]]:
    pairs = []
    rest = list(tokens)
    while rest:
        token = rest.pop(0)
        assignment = _ASSIGNMENT.fullmatch(token.removeprefix("--"))
        if assignment:
            pairs.append((assignment[1], assignment[2]))
        elif not token.startswith("--") or len(token) == 2:
            document.report((), f"unexpected {token!r}; write `--key value` or `key=value`.", COMMAND_LINE)
        elif rest and not rest[0].startswith("--") and not (is_switch(_path(token[2:])[0]) and "=" in rest[0]):
            pairs.append((token[2:], rest.pop(0)))
        elif is_switch(_path(token[2:])[0]):
            pairs.append((token[2:], "true"))
        else:
            document.report(_path(token[2:]), "needs a value.", COMMAND_LINE)
    return pairs


def _path(key: str) -> tuple[Any, ...]:
    """Split a dotted key. Dashes are underscores in keys, but not in names inside a mapping, such as a task's."""
    first, *others = key.split(".")
    first = first.replace("-", "_")
    if first == "datasets":
        others = [part.replace("-", "_") for part in others]
    return (first, *(int(part) if part.isdecimal() else part for part in others))


def _set(document: Document, path: KeyPath, text: str) -> None:
    container: Any = document.data
    reached: KeyPath = ()
    for depth, part in enumerate(path):
        if not isinstance(container, dict | list):
            document.report(
                path, f"`{dotted(reached)}` is a single value, nothing inside it can be set.", COMMAND_LINE
            )
            return
        if isinstance(container, list) and (not isinstance(part, int) or part >= len(container)):
            message = f"`{dotted(reached)}` has {len(container)} entries, numbered from 0; there is no {part!r}."
            document.report(path, message, COMMAND_LINE)
            return
        # In a mapping a number is a name like any other.
        part = str(part) if isinstance(container, dict) else part
        reached = (*reached, part)
        if depth == len(path) - 1:
            break
        if isinstance(container, dict) and container.get(part) is None:
            container[part] = {}
            document.lines[reached] = COMMAND_LINE
        container = container[part]
    try:
        container[part] = parse_value(document, reached, text)
    except ValueError as error:
        document.report(path, str(error), COMMAND_LINE)
