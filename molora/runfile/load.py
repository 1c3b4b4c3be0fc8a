"""From a YAML file and overrides to a `RunFile`, or to one error that lists every mistake."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from molora.config import MoLoraConfig
from molora.errors import ConfigError, did_you_mean, one_of
from molora.quantization import Quantization
from molora.runfile import keys
from molora.runfile.arguments import DatasetArguments, EvaluationArguments, LaunchArguments, ModelArguments
from molora.runfile.datasets import check_datasets, looks_local
from molora.runfile.document import Document, KeyPath, closest_file, expand, read_document
from molora.runfile.overrides import apply_overrides
from molora.runfile.renamed import REFUSED, RENAMED, RENAMED_IN_DATASETS
from molora.runfile.run import SINGLE, RunFile, accelerate_profiles
from molora.runfile.values import is_valid, mistakes

REQUIRED = {"model_name_or_path", "output_dir", "datasets", "path"}
"""Keys without a default, of the file and of an entry of `datasets`."""


def load_run_file(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> RunFile:
    """Read and check a run file.

    Args:
        path: The YAML file.
        overrides: Command-line tokens applied on top: `--key value`, `--key=value` or `key=value`. A dataset path
            given here is relative to the current directory, as a path typed in a shell is.

    Raises:
        ConfigError: Listing every mistake with its line.

    Example:
        >>> run = load_run_file("configs/quickstart.yaml", ["--max_steps", "10"])  # doctest: +SKIP
        >>> run.training["max_steps"]  # doctest: +SKIP
        10
    """
    document = read_document(path)
    table = keys.top_level_keys()
    apply_overrides(document, overrides, lambda name: name in table and is_valid(True, table[name].hint))
    values = _checked(document, (), document.data, table, {**RENAMED, **REFUSED})
    groups: dict[str, dict[str, Any]] = {key.group: {} for key in table.values()}
    for name, value in values.items():
        groups[table[name].group][name] = value
    datasets = check_datasets(document, _checked_entries(document))
    _check_together(document, values, datasets)
    preset = groups[keys.ADAPTER].pop("preset", None)
    adapter = _adapter(document, preset, groups[keys.ADAPTER])
    document.raise_mistakes()
    assert adapter is not None, "an adapter is missing only if a mistake was noted"
    return RunFile(
        path=Path(path),
        model=ModelArguments(**groups[keys.MODEL]),
        adapter=adapter,
        training=groups[keys.TRAINING],
        datasets=tuple(DatasetArguments(**entry) for entry in datasets),
        evaluation=EvaluationArguments(**groups[keys.EVALUATION]),
        launch=LaunchArguments(**groups[keys.LAUNCH]),
        overwrite=groups[keys.RUN].get("overwrite", False),
        license=groups[keys.RUN].get("license"),
        preset=preset,
        document=document,
    )


def _checked(
    document: Document,
    path: KeyPath,
    given: Mapping[str, Any],
    table: Mapping[str, keys.Key],
    refused: Mapping[str, str],
) -> dict[str, Any]:
    """The values of a mapping whose key and type are right; everything else is noted as a mistake."""
    values = {}
    for name, value in given.items():
        here = (*path, name)
        if name in table:
            found = list(mistakes(value, table[name].hint))
            for inner, message in found:
                if here == ("datasets",) and isinstance(value, str | list):
                    message = "each entry starts with `- path: …`; " + message
                document.report((*here, *inner), message)
            if not found:
                values[name] = value
        elif name in refused:
            document.report(here, refused[name])
        else:
            hint = did_you_mean(name, table) or (" See `molora schema`." if not path else "")
            if path and not hint:
                hint = f" Allowed are {', '.join(table)}."
            document.report(here, f"unknown key.{hint}")
    for name, key in table.items():
        if name not in given and name in REQUIRED:
            document.report((*path, name), f"is missing: {key.help[0].lower()}{key.help[1:]}")
    return values


def _checked_entries(document: Document) -> list[tuple[int, dict[str, Any]]]:
    """The entries of `datasets` that have a usable path, each with its index."""
    entries = document.data.get("datasets")
    if entries == []:
        document.report(("datasets",), "is empty; list at least one dataset.")
    usable = []
    for index, entry in enumerate(entries if isinstance(entries, list) else []):
        if isinstance(entry, dict):
            values = _checked(document, ("datasets", index), entry, keys.dataset_keys(), RENAMED_IN_DATASETS)
            if "path" in values:
                usable.append((index, values))
    return usable


def _adapter(document: Document, preset: str | None, fields: dict[str, Any]) -> MoLoraConfig | None:
    """Build the adapter's config, with its mistakes noted at the lines of their fields."""
    if any(_concerns_adapter(problem.field) for _, problem in document.mistakes):
        # A combination can only be judged with every value that was meant to be part of it.
        return None
    try:
        config = MoLoraConfig(**fields) if preset is None else MoLoraConfig.from_preset(preset, **fields)
    except ConfigError as error:
        for problem in error.problems:
            if document.line((problem.field,)) or preset is None:
                document.report((problem.field,), problem.message)
            else:
                document.report(("preset",), f"{problem.field}: {problem.message}")
        return None
    config.task_type = "CAUSAL_LM"
    return config


def _concerns_adapter(field: str) -> bool:
    """Whether a mistake is about a field of the adapter, or an unknown key that was probably meant to be one."""
    table, name = keys.top_level_keys(), field.split(".")[0]
    if name in table:
        return table[name].group == keys.ADAPTER
    return bool(did_you_mean(name, [key.name for key in table.values() if key.group == keys.ADAPTER]))


def _check_together(document: Document, values: Mapping[str, Any], datasets: Sequence[Mapping[str, Any]]) -> None:
    """Note mistakes that show only when keys are seen together, or against the files on disk."""
    for name in ("model_name_or_path", "adapter_name_or_path"):
        value = values.get(name)
        if value and looks_local(value, Path()) and not os.path.exists(expand(value)):
            document.report((name,), f"there is no folder {value!r}.{closest_file(expand(value))}")
    _check_launch(document, values)
    asked = {field.name: values[field.name] for field in dataclasses.fields(Quantization) if field.name in values}
    for field, message in Quantization(**asked).problems():
        document.report((field,), message)
    for old, new in (
        ("gradient_checkpointing", "activation_checkpointing"),
        ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
    ):
        if old in values and new in values:
            document.report((old,), f"is the old name of `{new}`; give only one of them.")
    has_eval = any(entry.get("eval_path") or entry.get("eval_split") for entry in datasets)
    if values.get("eval_strategy", "no") != "no" and datasets and not has_eval:
        document.report(("eval_strategy",), "needs a dataset with `eval_path` or `eval_split`.")
    by_best = "load_best_model_at_end" if values.get("load_best_model_at_end") else "save_strategy"
    best = values.get("load_best_model_at_end") or values.get("save_strategy") == "best"
    if best and not values.get("metric_for_best_model"):
        document.report((by_best,), "tasks are evaluated one by one; set `metric_for_best_model: eval_<task>_loss`.")


def _check_launch(document: Document, values: Mapping[str, Any]) -> None:
    given, processes = values.get("accelerate_config"), values.get("num_processes") or 1
    profiles = accelerate_profiles()
    if given is None or given in profiles:
        if given in SINGLE and processes > 1:
            document.report(("num_processes",), f"got {processes}, and accelerate_config {given!r} runs one process.")
    elif expand(given).is_dir():
        document.report(("accelerate_config",), f"{given!r} is a folder; name a file of `accelerate config`.")
    elif looks_local(given, Path()) and not expand(given).is_file():
        document.report(("accelerate_config",), f"there is no file {given!r}.{closest_file(expand(given))}")
    elif not expand(given).is_file():
        document.report(("accelerate_config",), f"{one_of(given, profiles)} Or name a file of `accelerate config`.")
