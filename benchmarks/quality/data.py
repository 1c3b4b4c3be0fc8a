"""Rows of a folder of tasks: what is trained on, what chooses learning rates, and what is scored once.

A folder holds `train/TASK.jsonl` and `test/TASK.jsonl`. No row serves two purposes, and none is used whose prompt was
seen before.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from molora.data import IGNORED, Example, Row, encode_parts, examples_of, read_rows
from molora.errors import DataError, did_you_mean

ORDER_SEED = 1
"""Order in which the rows of a training file are taken; the same for every seed of a run."""

STREAM_SEED = 100
"""Added to the seed of a run, it shuffles the tasks into one stream."""


@dataclass(frozen=True)
class Item:
    """One prompt, its answer, and what else could have been answered, as token ids.

    Attributes:
        task: Index of the task.
        prompt: At least one token.
        answer: The right answer with the end of its turn.
        choices: Every allowed answer; empty if any text may follow.
        label: Index of the right one; -1 without choices.
        characters: Of each choice.
        by_length: Choices are compared by log-likelihood a character, not in all.
    """

    task: int
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...] = ()
    label: int = -1
    characters: tuple[int, ...] = ()
    by_length: bool = False

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.prompt) + len(self.answer)

    def columns(self, experts: int = 0) -> dict[str, Any]:
        """A row as `TaskCollator` takes it; with `experts`, the task's own expert has all of the score."""
        row: dict[str, Any] = {
            "input_ids": [*self.prompt, *self.answer],
            "labels": [IGNORED] * len(self.prompt) + [*self.answer],
            "task_ids": self.task,
        }
        return row | ({"expert_scores": list(self.scores(experts))} if experts else {})

    def scores(self, experts: int) -> tuple[float, ...]:
        """One for the task's own expert, zero for the others; nothing without experts."""
        return tuple(float(index == self.task) for index in range(experts))


Batch = list[Item]


@dataclass(frozen=True)
class TaskRows:
    """Encoded rows by task, in the order of the names.

    Attributes:
        names: Names of the tasks.
        pools: What streams are made of; all of them use every row.
        validation: Rows that are in no stream; they choose learning rates.
        test: Rows that are scored in final runs only.
        digest: Changes if any file does.
    """

    names: tuple[str, ...]
    pools: list[list[Item]]
    validation: list[list[Item]]
    test: list[list[Item]]
    digest: str


def found_tasks(folder: Path, wanted: Sequence[str] | None) -> list[str]:
    """Names of the tasks to use: those that were asked for, or all with both files.

    Raises:
        DataError: There is none, or one that was asked for lacks a file.
    """
    sides = [{file.stem for file in (folder / side).glob("*.jsonl")} for side in ("train", "test")]
    known = sorted(sides[0] & sides[1])
    if not known:
        raise DataError(f"{folder}: needs train/TASK.jsonl and test/TASK.jsonl of the same name; found no such pair.")
    for name in wanted or ():
        if name not in known:
            hint = did_you_mean(name, known)
            raise DataError(f"{folder}: no task {name!r}; there are {', '.join(known)}.{hint}")
    if wanted and len(set(wanted)) < len(wanted):
        raise DataError(f"a task is named twice: {', '.join(wanted)}.")
    return list(wanted or known)


def load_rows(
    folder: Path,
    names: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    per_task: int,
    max_length: int,
    validation: int,
    test_rows: int,
) -> TaskRows:
    """Read and encode the rows of all tasks.

    Args:
        folder: Holds `train` and `test`.
        names: Tasks to read.
        tokenizer: Encodes, by its chat template.
        per_task: Rows of a task in a stream; a file with fewer is gone through again.
        max_length: Longer training and validation rows are left out. Test rows are taken as they are.
        validation: Rows a task for validation, the next ones after those of the streams.
        test_rows: The last so many rows of each test file.

    Raises:
        DataError: A file cannot be read, or a task has too few rows.
    """
    pools, held_out, test = [], [], []
    for index, name in enumerate(names):
        scored = read_rows(str((folder / "test" / f"{name}.jsonl").absolute()))
        test.append([_item(e, row, index, tokenizer) for row in scored[-test_rows:] for e in examples_of(row, name)])
        seen = {_asked(example) for row in scored for example in examples_of(row, name)}
        rows = read_rows(str((folder / "train" / f"{name}.jsonl").absolute()))
        fitting = _fitting(rows, name, index, tokenizer, seen, max_length, per_task + validation)
        if len(fitting) <= validation:
            raise DataError(
                f"task {name!r}: {len(fitting)} training rows of at most {max_length} tokens, of which {validation} "
                "are for validation; give more or shorter rows, a larger --max_length, or a smaller --validation."
            )
        own, rest = fitting[: len(fitting) - validation], fitting[len(fitting) - validation :]
        pools.append([own[at % len(own)] for at in range(per_task)])
        held_out.append(rest)
    return TaskRows(tuple(names), pools, held_out, test, _digest(folder, names))


def stream(rows: TaskRows, seed: int, batch_size: int) -> list[Batch]:
    """The batches of one seed: the same rows for every seed, in another order."""
    pool = [item for task in rows.pools for item in task]
    random.Random(STREAM_SEED + seed).shuffle(pool)
    return [pool[at : at + batch_size] for at in range(0, len(pool), batch_size)]


def only_task(batches: Sequence[Batch], task: int) -> list[Batch]:
    """What one task has of a stream: its rows in the batches they were in, without batches that have none.

    So a model of one task takes about as many steps as the mixture, on the same rows at the same times.
    """
    own = [[item for item in batch if item.task == task] for batch in batches]
    return [batch for batch in own if batch]


def _fitting(
    rows: list[Row],
    name: str,
    index: int,
    tokenizer: PreTrainedTokenizerBase,
    seen: set[str],
    max_length: int,
    wanted: int,
) -> list[Item]:
    """The first rows in a fixed order that fit and were not seen before."""
    found: list[Item] = []
    for example, row in _shuffled(rows, name):
        if len(found) == wanted:
            break
        if (asked := _asked(example)) in seen:
            continue
        item = _item(example, row, index, tokenizer)
        if item.length <= max_length:
            seen.add(asked)
            found.append(item)
    return found


def _shuffled(rows: list[Row], name: str) -> Iterator[tuple[Example, Row]]:
    order = list(rows)
    random.Random(ORDER_SEED).shuffle(order)
    return ((example, row) for row in order for example in examples_of(row, name))


def _asked(example: Example) -> str:
    return json.dumps(example.prompt, sort_keys=True)


def _item(example: Example, row: Row, index: int, tokenizer: PreTrainedTokenizerBase) -> Item:
    prompt, answer = encode_parts(example, tokenizer)
    if not prompt:
        raise DataError(f"{row.where}: there is no prompt; every row needs `messages` that end with an answer.")
    choices = [encode_parts(replace(example, completion=choice), tokenizer)[1] for choice in example.choices]
    by_length = row.values.get("metric") == "choice_norm"
    characters = tuple(map(len, example.choices))
    return Item(index, tuple(prompt), tuple(answer), tuple(map(tuple, choices)), example.label, characters, by_length)


def _digest(folder: Path, names: Sequence[str]) -> str:
    total = hashlib.sha256()
    for name in names:
        for side in ("train", "test"):
            total.update((folder / side / f"{name}.jsonl").read_bytes())
    return total.hexdigest()[:16]
