"""`molora presets`: the published methods a run file can start from."""

from __future__ import annotations

import inspect
import sys

from molora.config import MoLoraConfig
from molora.presets import METHODS, PRESETS

_COLUMNS = ("router", "gate", "selection")


def run() -> int:
    """Print a table of presets."""
    sys.stdout.write(table())
    return 0


def table() -> str:
    """One line per preset, by kind: its name, its routing choices and the first line of its docstring."""
    rows = {name: _row(name) for name in PRESETS}
    header = ("preset", *_COLUMNS, "summary")
    widths = [max(map(len, column)) for column in zip(header, *rows.values(), strict=True)]
    lines = [_aligned(header, widths)]
    for kind, names in METHODS.items():
        lines += ["", f"{kind}:", *(_aligned(rows[name], widths) for name in names)]
    return "\n".join(lines) + "\n"


def _row(name: str) -> tuple[str, ...]:
    config = MoLoraConfig.from_preset(name)
    summary = (inspect.getdoc(PRESETS[name]) or "").partition("\n")[0]
    return (name, *(getattr(config, column) for column in _COLUMNS), summary)


def _aligned(cells: tuple[str, ...], widths: list[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
