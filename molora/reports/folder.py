"""What lies in the folder of an adapter or a run, read as data; nothing of it is executed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from molora.folders import CONFIG_FILE
from molora.loaded import run_file_of
from molora.report import REPORT_FILE
from molora.slim.adapter import PREFIX, Adapter, read_adapter

STATE_FILE = "trainer_state.json"
_CALLBACK = "molora"
"""Key of the routing's history in a trainer's state."""


@dataclass(frozen=True)
class Folder:
    """An adapter, and what its training left beside it.

    Attributes:
        path: Where the adapter lies: the folder that was given, or the last whole checkpoint in it.
        adapter: The adapter.
        is_checkpoint: Whether it is one of a training that went on, or could.
        record: `molora_report.json`; empty if it is not there. Of a checkpoint, without what holds for the end only.
        state: `trainer_state.json`; empty if it is not there.
        run_text: The run file, if it is there.
        notes: What could not be read, in sentences.
    """

    path: Path
    adapter: Adapter
    is_checkpoint: bool
    record: dict[str, Any]
    state: dict[str, Any]
    run_text: str | None
    notes: list[str] = field(default_factory=list)

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks it was trained on, by id, as far as known."""
        return [str(name) for name in listed(self.record, "tasks")]

    @property
    def history(self) -> tuple[list[str], list[dict[str, Any]]]:
        """Names of the linears, and what the checkpoint keeps of their routing, entry by entry."""
        kept = self.state.get("stateful_callbacks", {})
        prefixes = kept.get(_CALLBACK, {}).get("history", {}) if isinstance(kept, dict) else {}
        first: dict[str, Any] = next(iter(prefixes.values()), {}) if isinstance(prefixes, dict) else {}
        names = [str(name).removeprefix(PREFIX) for name in first.get("layers", [])]
        return names, [entry for entry in first.get("entries", []) if isinstance(entry, dict)]


def read_folder(directory: str) -> Folder:
    """Read an adapter folder, a run folder or a checkpoint.

    A run that has not finished holds no adapter but checkpoints; then the last whole one is read.

    Raises:
        ConfigError: If there is no usable adapter.
    """
    path = _adapter_in(Path(directory))
    adapter = read_adapter(path)
    notes: list[str] = []
    is_checkpoint = path.absolute().name.startswith("checkpoint-")
    places = [path, path.absolute().parent] if is_checkpoint else [path]
    record = next(filter(None, (_json_of(place / REPORT_FILE, notes) for place in places)), {})
    if is_checkpoint:
        record = {name: record[name] for name in ("tasks", "before") if name in record}
    state = next(filter(None, (_json_of(place / STATE_FILE, notes) for place in (path, *_checkpoints(path)))), {})
    run_file = run_file_of(str(path))
    text = None
    if run_file is not None:
        try:
            text = run_file.read_text(encoding="utf-8")
        except (OSError, ValueError):
            notes.append(f"{run_file.name} cannot be read and is left out.")
    return Folder(path, adapter, is_checkpoint, record, state, text, notes)


def listed(values: dict[str, Any], key: str) -> list[Any]:
    """A list in a file; empty if it is none."""
    found = values.get(key)
    return found if isinstance(found, list) else []


def _adapter_in(folder: Path) -> Path:
    if folder.is_dir() and not (folder / CONFIG_FILE).is_file() and any(folder.glob("*checkpoint-*")):
        from molora.trainers.checkpoints import last_whole_checkpoint

        found = last_whole_checkpoint(folder)
        return folder if found is None else Path(found)
    return folder


def _checkpoints(folder: Path) -> Iterator[Path]:
    """Checkpoints in a folder, the last first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    yield from sorted(found, key=lambda path: -int(path.name.removeprefix("checkpoint-")))


def _json_of(path: Path, notes: list[str]) -> dict[str, Any]:
    """A mapping in a JSON file; empty if it is not there, or damaged, which is noted."""
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        values = None
    if not isinstance(values, dict):
        notes.append(f"{path.name} is damaged and left out.")
        return {}
    return values
