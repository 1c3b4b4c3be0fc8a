"""What an export starts from: an adapter on its base model, its tokenizer, and rows to calibrate with and to score."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from molora.adapters import read_adapter_config, read_adapter_tensors
from molora.config import MoLoraConfig
from molora.data import TaskCollator, TaskData, load_tasks, mix, tokenize_tasks
from molora.errors import ConfigError, DataError, Problem
from molora.export.dense import dequantized
from molora.export.measure import twin_of
from molora.loaded import load_base_of, read_run, saved_tokenizer
from molora.plain.calibrate import batches_by_part
from molora.plain.moments import Batch
from molora.quantization import RUN_FILE
from molora.report import known_tasks
from molora.runfile import RunFile
from molora.runfile.arguments import DatasetArguments

ADAPTER = "default"
BATCH_SIZE = 8


@dataclass(frozen=True)
class Source:
    """An adapter, loaded.

    Attributes:
        directory: Its folder.
        config: Its config.
        run: The run that trained it, if its file lies beside it.
        model: The base model with the adapter.
        plain: The same base model without it, sharing its parameters.
        tokenizer: With the chat template it was trained with.
        base_model: Name or folder of the base model.
    """

    directory: str
    config: MoLoraConfig
    run: RunFile | None
    model: PeftModel
    plain: Any
    tokenizer: PreTrainedTokenizerBase
    base_model: str

    def known_tasks(self) -> list[str]:
        """Names of the tasks it was trained on, by id, as far as known."""
        return known_tasks(self.directory)

    @cached_property
    def others(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What the adapter trained besides experts, such as whole modules, and the fields that say so."""
        tensors = read_adapter_tensors(self.directory)
        kept = {name: value for name, value in tensors.items() if ".molora_" not in name}
        bias = {"molora_only": "lora_only"}.get(self.config.bias, self.config.bias)
        fields = {
            "bias": bias,
            "modules_to_save": self.config.modules_to_save,
            "trainable_token_indices": self.config.trainable_token_indices,
        }
        return kept, fields


def load_source(
    directory: str, *, base_model: str | None = None, dtype: str | None = None, dequantize: bool = False
) -> Source:
    """Load an adapter on its base model, in the dtype and quantisation of its run.

    Args:
        directory: Folder of the adapter.
        base_model: Name or folder to use instead of the one the adapter names.
        dtype: Of the base model; default that of the run, or of the checkpoint.
        dequantize: Undo the quantisation of the base model after loading.

    Raises:
        ConfigError: If there is no usable adapter, or its base model is not known.
        MoloraError: If the base model cannot be loaded.
    """
    config = read_adapter_config(directory)
    read_adapter_tensors(directory)  # a damaged file is better found before the base model is loaded
    run = read_run(directory)
    if dtype is None:
        dtype = run.model.dtype if run is not None and not base_model else "auto"
    base, tokenizer = load_base_of(directory, config, base_model, dtype)
    if dequantize:
        base = dequantized(base)
    device = torch.accelerator.current_accelerator()
    if device is not None and getattr(base, "quantization_method", None) is None:  # quantised ones are there already
        base.to(device)  # type: ignore[arg-type]  # a decorator of transformers hides the signature
    plain = twin_of(base, own_biases=config.bias != "none")
    model = PeftModel.from_pretrained(base, directory, adapter_name=ADAPTER).eval()
    tokenizer = saved_tokenizer(directory, tokenizer, base)
    name = str(base_model or config.base_model_name_or_path)
    return Source(directory, config, run, model, plain, tokenizer, name)


@dataclass(frozen=True)
class Rows:
    """Data of an export.

    Attributes:
        origin: Where the calibration rows come from, in words.
        parts: Batches to fit to, to choose by and to judge by.
        fitted: The encoded rows of all parts but the one to judge by.
        by_task: The same rows task by task, undealt.
        scored: Tasks with rows to score; empty if there are none.
    """

    origin: str
    parts: dict[str, list[Batch]]
    fitted: list[Any]
    by_task: dict[str, list[Any]]
    scored: list[TaskData]


def read_rows_for(source: Source, files: Sequence[str], scored: Sequence[str], rows: int, seed: int) -> Rows:
    """Read calibration rows, from files or from the data the adapter was trained on, and rows to score.

    Args:
        source: The adapter.
        files: Files to calibrate with; empty for the training data of the run.
        scored: Files to score on; empty for the evaluation data of the run, if there is some.
        rows: At most so many rows to calibrate with, drawn at random.
        seed: Of the draw.

    Raises:
        ConfigError: If there is no data to calibrate with.
        DataError: If a file cannot be used.
    """
    names = known_tasks(source.directory)
    if files:
        tasks, origin = _of_files(files, names), ", ".join(files)
    else:
        tasks, origin = _of_run(source), "the data it was trained on"
    max_length = source.run.training.get("max_length", 1024) if source.run is not None else 1024
    encoded = tokenize_tasks(tasks, source.tokenizer, max_length)
    weights = [task.weight for task in tasks if task.train]
    mixed = _distinct(mix([task.dataset for task in encoded], weights, seed))[:rows]
    collate = TaskCollator(int(source.tokenizer.pad_token_id))
    by_task = {task.name: _distinct(mix([task.dataset], [1.0], seed))[:rows] for task in encoded}
    given = _of_files(scored, names) if scored else []
    evaluated = [replace(task, eval=task.train) for task in given] or [task for task in tasks if not files]
    fitted = [row for index, row in enumerate(mixed) if index % 10 < 9]
    return Rows(origin, batches_by_part(mixed, collate, BATCH_SIZE), fitted, by_task, _with_eval(evaluated))


def parts_of_task(source: Source, rows: Rows, task: str) -> dict[str, list[Batch]]:
    """The calibration rows of one task alone, dealt out."""
    return batches_by_part(rows.by_task[task], TaskCollator(int(source.tokenizer.pad_token_id)), BATCH_SIZE)


def _distinct(rows: Iterable[Any]) -> list[Any]:
    """Every row once: what is judged by must not have been fitted to."""
    found: dict[Any, Any] = {}
    for row in rows:
        found.setdefault((*row["input_ids"], row.get("task_ids")), row)
    return list(found.values())


def only_task(rows: Rows, task: int) -> Rows:
    """The rows of one task alone, by its id."""
    parts: dict[str, list[Batch]] = {}
    for part, batches in rows.parts.items():
        kept = [{name: value[batch["task_ids"] == task] for name, value in batch.items()} for batch in batches]
        parts[part] = [batch for batch in kept if len(batch["input_ids"])]
    scored = [one if index == task else replace(one, eval=[]) for index, one in enumerate(rows.scored)]
    return replace(rows, parts=parts, scored=_with_eval(scored))


def _with_eval(tasks: list[TaskData]) -> list[TaskData]:
    return tasks if any(task.eval for task in tasks) else []


def _of_files(files: Sequence[str], names: Sequence[str]) -> list[TaskData]:
    """The tasks in files, in the order of the adapter's own tasks where it knows them: the place is the id."""
    specs = [DatasetArguments(path=str(Path(file).expanduser().absolute())) for file in files]
    found = {task.name: task for task in load_tasks(specs, seed=0)}
    order = [*names, *(name for name in found if name not in names)]
    return [found.get(name, TaskData(name, 1.0, [], [])) for name in order]


def _of_run(source: Source) -> list[TaskData]:
    if source.run is None:
        message = (
            f"{source.directory} holds no {RUN_FILE} that can be read, so the data it was trained on is not known; "
            "name a file of rows like those the model will see: --calibrate data.jsonl."
        )
        raise ConfigError([Problem("--calibrate", message)], "no data to calibrate with")
    try:
        return load_tasks(source.run.datasets, source.run.training.get("seed", 42))
    except DataError as error:
        message = f"the data it was trained on cannot be read ({error}); name a file: --calibrate data.jsonl."
        raise ConfigError([Problem("--calibrate", message)], "no data to calibrate with") from error


__all__ = ["ADAPTER", "Rows", "Source", "load_source", "parts_of_task", "read_rows_for", "read_run"]
