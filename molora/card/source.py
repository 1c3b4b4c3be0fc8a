"""Everything a model card is written from: an adapter's folder, and what its training left there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from molora.card.method import preset_of
from molora.card.training import training_in
from molora.config import MoLoraConfig
from molora.folders import WEIGHTS_FILE
from molora.loaded import run_file_of
from molora.presets import PRESETS
from molora.reports.data import Score
from molora.reports.folder import Folder, listed, read_folder
from molora.reports.training import scores_of
from molora.shown import hub_id, is_path, last_part, without_paths
from molora.slim.adapter import Adapter

OTHER_WEIGHTS = "adapter_model.bin"
"""What PEFT writes with `safe_serialization=False`; it is not opened."""


@dataclass(frozen=True)
class Source:
    """What a card is written from.

    Attributes:
        folder: The adapter, and the files beside it.
        run: The run file's values, its paths cut to their last part; empty if it is not there.
        dataset_ids: For each of `datasets` what it was trained and what it was scored on, by ids on the hub; `None`
            for what lies on a disk.
        training: What the trainer noted; empty if it is not known.
        base: Id of the base model on the hub; `None` if it has none, or none is known.
        base_shown: What the base model is called.
        preset: The method, if it is one that molora knows.
    """

    folder: Folder
    run: dict[str, Any]
    dataset_ids: list[tuple[str | None, str | None]]
    training: dict[str, Any]
    base: str | None
    base_shown: str
    preset: str | None

    @property
    def config(self) -> MoLoraConfig:
        """The adapter's choices."""
        return self.folder.adapter.config

    @property
    def scores(self) -> list[Score]:
        """Scores before and after; none if none are known."""
        found = scores_of(self.folder)
        return [] if isinstance(found, str) else found

    @property
    def datasets(self) -> list[dict[str, Any]]:
        """The run's datasets."""
        return _datasets(self.run)

    def task_name(self, index: int) -> str:
        """What a task is called, by its id."""
        names = self.folder.tasks
        return names[index] if index < len(names) else f"task {index}"


def read_source(folder: Path, config: MoLoraConfig | None, state: Mapping[str, Any] | None) -> Source:
    """Read what a card is written from.

    Args:
        folder: Folder of an adapter.
        config: Its config if it is at hand, for weights that are not read.
        state: State of the trainer that has the adapter; default what lies in the folder.

    Raises:
        ConfigError: If there is no usable adapter.
    """
    if config is not None and not (folder / WEIGHTS_FILE).is_file():
        found = Folder(folder, Adapter(config, {}), False, {}, {}, None)
    else:
        found = read_folder(str(folder))
    if state is not None:
        found = replace(found, state=dict(state))
    whole = _run(found.run_text)
    file = run_file_of(str(found.path))
    ids = [_ids_of(entry, None if file is None else file.parent) for entry in _datasets(whole)]
    run: dict[str, Any] = _cleaned(whole)
    named = str(found.adapter.config.base_model_name_or_path or "")
    asked = str(run.get("model_name_or_path") or "")
    shown = hub_id(named) or (asked if asked and not is_path(asked) else last_part(named)) or "a model"
    preset = run.get("preset") if run.get("preset") in PRESETS else preset_of(found.adapter.config)
    return Source(found, run, ids, training_in(found.state), hub_id(named), shown, preset)


def has_weights(folder: Path) -> bool:
    """Whether a folder holds an adapter's weights; a config alone gets no card."""
    return any((folder / name).is_file() for name in (WEIGHTS_FILE, OTHER_WEIGHTS))


def _run(text: str | None) -> dict[str, Any]:
    try:
        values = yaml.safe_load(text or "")
    except yaml.YAMLError:
        return {}
    return values if isinstance(values, dict) else {}


def _datasets(run: dict[str, Any]) -> list[dict[str, Any]]:
    return [entry for entry in listed(run, "datasets") if isinstance(entry, dict)]


def _ids_of(entry: dict[str, Any], beside: Path | None) -> tuple[str | None, str | None]:
    """Ids of what a dataset of the run file trains and scores on, while its paths are whole."""
    path = entry.get("path") or ""
    return hub_id(str(path), beside), hub_id(str(entry.get("eval_path") or path), beside)


def _cleaned(value: Any) -> Any:
    """A value of the run file with paths cut to their last part."""
    if isinstance(value, dict):
        return {name: _cleaned(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_cleaned(inner) for inner in value]
    if isinstance(value, str):
        return hub_id(value) or last_part(value) if is_path(value) else without_paths(value)
    return value
