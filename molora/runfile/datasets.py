"""Checks of the `datasets` list against the files on disk."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from molora.runfile.document import COMMAND_LINE, Document, KeyPath, closest_file, expand

_FILE_ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".arrow", ".gz", ".zst")


def looks_local(value: str, base: Path) -> bool:
    """Whether a value names a file or folder, existing or not, rather than something on the hub."""
    if value.startswith(("./", "../", "/", "~")) or value in (".", "..") or value.endswith(_FILE_ENDINGS):
        return True
    # A hub id has at most one slash.
    return value.count("/") > 1 or os.path.exists(base / value)


def check_datasets(document: Document, entries: Sequence[tuple[int, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Make local paths absolute and note the mistakes in each dataset.

    Args:
        document: The run file; relative paths start in its folder, those of the command line in the current one.
        entries: Index and values of each dataset.
    """
    return [_check_dataset(document, ("datasets", index), dict(values)) for index, values in entries]


def _check_dataset(document: Document, here: KeyPath, values: dict[str, Any]) -> dict[str, Any]:
    for name in ("path", "eval_path"):
        if values.get(name) is not None:
            values[name] = _resolve(document, (*here, name), values[name])
    is_file = os.path.isfile(values["path"])
    if is_file and values.get("name") is not None:
        document.report((*here, "name"), "names a configuration of a hub dataset, but `path` is a file; leave it out.")
    if is_file and values.get("eval_split") and not values.get("eval_path"):
        document.report((*here, "eval_split"), "a file has no splits; give the file to evaluate on as `eval_path`.")
    if values.get("eval_max_samples") and not (values.get("eval_path") or values.get("eval_split")):
        document.report((*here, "eval_max_samples"), "has no effect without `eval_path` or `eval_split`.")
    return values


def _resolve(document: Document, path: KeyPath, value: str) -> str:
    base = Path() if document.line(path) == COMMAND_LINE else expand(document.name).parent
    if not looks_local(value, base):
        return value
    local = (base / expand(value)).resolve()
    if not os.path.exists(local):
        document.report(path, f"there is no file {value!r}.{closest_file(local)}")
    return str(local)
