"""Which rows, and which text, a report looks at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from molora.config import MoLoraConfig
from molora.data import TaskCollator, TaskData, TokenizedTask, load_tasks, tokenize_tasks
from molora.errors import ConfigError, DataError, Problem
from molora.loaded import read_run
from molora.plan import routing_reads
from molora.reports.folder import Folder
from molora.runfile.arguments import DatasetArguments

LONGEST = 1024
"""Tokens of a row, unless its run says otherwise, and of a text."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is looked at.

    Attributes:
        data: Files of rows; none for the evaluation rows of the run.
        text: The text whose routing is shown; `None` for a held-out row.
        rows: Rows of each task; `None` for 16.
        base_model: Name or folder to use instead of the one the adapter names.
        routing: Run rows through the model; without, no base model is needed.
    """

    data: Sequence[str] = ()
    text: str | None = None
    rows: int | None = None
    base_model: str | None = None
    routing: bool = True

    def check(self, config: MoLoraConfig) -> None:
        """Refuse what contradicts itself, or what the adapter's routing cannot be shown.

        Raises:
            ConfigError: Listing every mistake.
        """
        problems = list(self._problems(config))
        if problems:
            raise ConfigError(problems, "cannot report like this")

    def _problems(self, config: MoLoraConfig) -> Iterator[Problem]:
        given = {"--data": self.data, "--text": self.text, "--rows": self.rows, "--base-model": self.base_model}
        for name, value in given.items():
            if not self.routing and value:
                yield Problem(name, "is about rows that run through the model, which --no-routing leaves out.")
        if self.rows is not None and self.rows < 1:
            yield Problem("--rows", f"got {self.rows}; must be at least 1.")
        if self.text is not None and not self.text.strip():
            yield Problem("--text", "got an empty text; leave it out to see a held-out row.")
        given_apart = routing_reads(config) & {"task", "scores"}
        if self.text is not None and given_apart:
            what = "the task of a row" if "task" in given_apart else "scores of its experts"
            message = f"the routing reads {what}, which a text does not bring; leave it out to see a held-out row."
            yield Problem("--text", message)


def rows_of(folder: Folder, options: Options) -> tuple[list[TaskData], str]:
    """Held-out rows by task, in `eval`, and where they come from; no tasks, and why, if there are none.

    Raises:
        ConfigError: If the routing reads the task of each row, and a file names one that was none in training; or
            scores, and a row has none.
        DataError: If a file that was named cannot be used.
    """
    if options.data:
        return _of_files(folder, options.data), ", ".join(Path(file).name for file in options.data)
    run = read_run(str(folder.path))
    advice = "Name rows to look at: `--data FILE`."
    if run is None:
        return [], f"No run file that can be read lies beside the adapter, so its data is not known. {advice}"
    try:
        tasks = load_tasks(run.datasets, run.training.get("seed", 42))
    except DataError as error:
        return [], f"The data of the run cannot be read ({error}). {advice}"
    if not any(task.eval for task in tasks):
        return [], f"The datasets of the run have no evaluation rows. {advice}"
    return tasks, "the run's evaluation rows"


def _of_files(folder: Folder, files: Sequence[str]) -> list[TaskData]:
    """The tasks in files, in the order of the adapter's own where it knows them: the place is the id."""
    specs = [DatasetArguments(path=str(Path(file).expanduser().absolute())) for file in files]
    found = {task.name: replace(task, train=[], eval=task.train) for task in load_tasks(specs, seed=0)}
    names = folder.tasks
    new = [name for name in found if name not in names]
    if new and "task" in routing_reads(folder.adapter.config):
        known = ", ".join(names) or "not known, as no report of the training lies beside the adapter"
        message = (
            f"the routing reads the task of each row, and {', '.join(new)} was none in training; these are {known}."
        )
        raise ConfigError([Problem("--data", message)], "cannot report on these rows")
    without = next((row for task in found.values() for row in task.eval if not row.expert_scores), None)
    if without is not None and "scores" in routing_reads(folder.adapter.config):
        message = f"the routing reads a number per expert of each row, and {without.where} has no `expert_scores`."
        raise ConfigError([Problem("--data", message)], "cannot report on these rows")
    return [found.get(name, TaskData(name, 1.0, [], [])) for name in (*names, *new)]


def tokenised(
    folder: Folder, tasks: Sequence[TaskData], tokenizer: PreTrainedTokenizerBase, rows: int
) -> list[TokenizedTask]:
    """So many rows of each task that has some, as the model sees them."""
    run = read_run(str(folder.path))
    longest = run.training.get("max_length", LONGEST) if run is not None else LONGEST
    few = [replace(task, eval=task.eval[:rows]) for task in tasks]
    return tokenize_tasks(few, tokenizer, longest, split="eval")


def text_batch(
    text: str | None, tasks: Sequence[TokenizedTask], tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, Any], str] | None:
    """A text, or the first held-out row, as a batch of one, and what it is; `None` if there is none."""
    if text is not None:
        ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :LONGEST]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, "the text that was given"
    if not tasks:
        return None
    row = tasks[0].dataset[0]
    return TaskCollator(int(tokenizer.pad_token_id))([row]), f"a held-out row of {tasks[0].name}"


def pieces_of(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each token. Bytes of one character that several tokens share stand with the last of them."""
    pieces, shown = [], ""
    for end in range(1, len(ids) + 1):
        whole = str(tokenizer.decode(list(ids[:end]), clean_up_tokenization_spaces=False))
        ready = whole.rstrip("\ufffd") if end < len(ids) else whole
        pieces.append(ready[len(shown) :] if ready.startswith(shown) else "")
        shown = ready if ready.startswith(shown) else shown
    return pieces
