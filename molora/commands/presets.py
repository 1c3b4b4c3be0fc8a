"""`molora presets`: the published methods a run file can start from."""

from __future__ import annotations

import inspect
import sys

from molora.config import MoLoraConfig
from molora.presets import PRESETS, available_presets

_COLUMNS = ("router", "gate", "selection")


def run() -> int:
    """Print a table of presets."""
    sys.stdout.write(table())
    return 0


def table() -> str:
    """One line per preset: its name, its routing choices and the first line of its docstring."""
    rows = [("preset", *_COLUMNS, "summary")]
    for name in available_presets():
        config = MoLoraConfig.from_preset(name)
        summary = (inspect.getdoc(PRESETS[name]) or "").partition("\n")[0]
        rows.append((name, *(getattr(config, column) for column in _COLUMNS), summary))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines) + "\n"
