"""What a benchmark prints and writes: a table, and everything behind it as JSON."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_tile", "amx_bf16", "amx_int8")
_PACKAGES = ("torch", "transformers", "peft", "molora", "mixlora", "moe-peft")


def machine(threads: int) -> dict[str, Any]:
    """What a number from here depends on, besides the code."""
    model, flags = _cpu()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {"cpu": model, "flags": flags, "cores": os.cpu_count(), "threads": threads, "load": load}


def _cpu() -> tuple[str, list[str]]:
    """Name of the processor, and which of the instructions that matter to matrix products it has."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine(), []
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    named = {key.strip(): value.strip() for key, value in fields.items()}
    have = named.get("flags", "").split()
    return named.get("model name", platform.machine()), [flag for flag in _FLAGS if flag in have]


def versions() -> dict[str, str]:
    """Versions of what was measured; packages that are not installed are left out."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as lines, columns as wide as they need; numbers to the right, a missing value as a dash."""
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[at]) for line in [list(columns), *cells]) for at in range(len(columns))]
    words = [any(isinstance(row.get(column), str) for row in rows) for column in columns]
    lines = []
    for line in [list(columns), *cells]:
        parts = (
            text.ljust(width) if word else text.rjust(width)
            for text, width, word in zip(line, widths, words, strict=True)
        )
        lines.append("  ".join(parts).rstrip())
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.3f}"
    return str(value)


def write_json(path: str | None, command: str, threads: int, content: dict[str, Any]) -> None:
    """Write a result with what it depends on; nothing without a path."""
    if path is None:
        return
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    head = {"command": command, "time": now, "machine": machine(threads), "versions": versions()}
    Path(path).write_text(json.dumps(head | content, indent=1, default=str) + "\n", encoding="utf-8")


def heading(command: str, threads: int, clock: str, shapes: Mapping[str, Any]) -> str:
    """The line above a table that says where and of what."""
    where = machine(threads)
    sizes = ", ".join(f"{name} {value}" for name, value in shapes.items())
    flags = " ".join(where["flags"])
    return (
        f"{command}: {sizes}\n"
        f"{where['cpu']} ({flags}), {threads} thread(s), {clock}, torch {torch.__version__}, load {where['load']}"
    )
