"""Read the rows of a dataset and remember where each came from.

`.jsonl` and `.json` are read here, because a message about a user's own file should name its line. Every other format
and every hub id goes through `datasets.load_dataset`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molora.errors import DataError, did_you_mean

# File suffix -> builder of `datasets`, for the formats not read here.
BUILDERS = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow", ".txt": "text"}
OWN_SUFFIXES = (".jsonl", ".json")


@dataclass(frozen=True)
class Row:
    """One row of a dataset.

    Attributes:
        values: Column name to value.
        where: `file:line`, or the dataset and row number, for messages.
    """

    values: Mapping[str, Any]
    where: str


def read_rows(path: str, *, name: str | None = None, split: str | None = None) -> list[Row]:
    """Read all rows of one split.

    Args:
        path: An absolute path of a file or folder, or a hub id.
        name: Configuration of a hub dataset.
        split: A split or a slice of one, `"train"` when None. A `.jsonl` or `.json` file is one split already, so the
            name of a split changes nothing there; a slice is an error.

    Raises:
        DataError: The dataset is missing, unreadable or empty.
    """
    file = Path(path)
    if not file.is_absolute():
        rows = _from_datasets(path, {"path": path, "name": name}, split)
    elif not file.exists():
        raise DataError(f"{path}: no such file or folder.{_similar_file(file)}")
    elif file.is_dir():
        rows = _from_datasets(path, {"path": path, "name": name}, split)
    elif file.suffix in OWN_SUFFIXES:
        if split and "[" in split:
            raise DataError(f"{path}: split {split!r} slices a plain file; use `max_samples` to take fewer rows.")
        rows = list(_from_json(file))
    elif file.suffix in BUILDERS:
        options = {"path": BUILDERS[file.suffix], "data_files": path}
        rows = _from_datasets(path, options | ({"sep": "\t"} if file.suffix == ".tsv" else {}), split)
    else:
        known = ", ".join([*OWN_SUFFIXES, *BUILDERS])
        raise DataError(f"{path}: files ending in {file.suffix!r} cannot be read; known endings are {known}.")
    if not rows:
        raise DataError(f"{path}: the file is empty, it has no rows.")
    return rows


def _from_json(file: Path) -> Iterator[Row]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read as UTF-8 text ({error}).") from error
    if text.lstrip().startswith("["):
        yield from _from_json_list(file, text)
        return
    # Not `splitlines`, which also breaks at characters JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{file}:{number}"
            yield Row(_as_object(_parse(line, where), where), where)


def _from_json_list(file: Path, text: str) -> Iterator[Row]:
    for number, value in enumerate(_parse(text, str(file)), start=1):
        where = f"{file}: item {number}"
        yield Row(_as_object(value, where), where)


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f" line {error.lineno}" if error.lineno > 1 else ""
        raise DataError(
            f"{where}: not valid JSON ({error.msg} at{line} column {error.colno}); "
            "expected one object a line, or one list of objects."
        ) from error


def _as_object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f'{where}: expected an object such as {{"messages": [...]}}, got {type(value).__name__}.')
    return value


def _from_datasets(label: str, options: dict[str, Any], split: str | None) -> list[Row]:
    import datasets

    try:
        loaded = datasets.load_dataset(**options, split=split or "train")
    # `datasets` lets errors of every library beneath it through: fsspec, pyarrow, requests, its builders.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise DataError(f"{label}: cannot load split {split or 'train'!r}: {reason}.") from error
    return [Row(values, f"{label}: row {number}") for number, values in enumerate(loaded, start=1)]


def _similar_file(file: Path) -> str:
    siblings = [other.name for other in file.parent.iterdir()] if file.parent.is_dir() else []
    return did_you_mean(file.name, siblings)
