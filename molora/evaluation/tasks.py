"""Score a model on every task's evaluation rows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from molora.data.formats import Example
from molora.data.mixture import TaskData
from molora.errors import MoloraError
from molora.evaluation.answers import answer
from molora.evaluation.metrics import token_f1
from molora.evaluation.rows import RowScore, encode_row, score_rows
from molora.evaluation.scores import TaskScore
from molora.modes import evaluating
from molora.progress import bar


def score_tasks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[TaskData],
    *,
    batch_size: int = 16,
    max_new_tokens: int = 64,
    task_ids: Sequence[int] | None = None,
    progress: bool = True,
) -> list[TaskScore]:
    """Score the evaluation rows of every task that has some, leaving the model in the mode it was in.

    Args:
        model: A causal language model, plain or wrapped by PEFT.
        tokenizer: Its tokenizer, with a pad token.
        tasks: Only `eval` is read.
        batch_size: Prompts a batch.
        max_new_tokens: Longest generated answer.
        task_ids: The id of each task, for routing that reads it; `None` for its position, as in training.
        progress: Show a progress bar over the rows of all tasks.

    Returns:
        One score a task and metric, in the order of the tasks.

    Raises:
        MoloraError: The model is not a decoder-only language model, its answers are NaN, or the tokenizer has no pad
            token.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise MoloraError(
            f"scoring needs a decoder-only language model, got {type(model).__name__}; score others by the trainer's "
            "own `evaluate`, or leave this out with `evaluate_tasks: false`."
        )
    if tokenizer.pad_token_id is None:
        raise MoloraError("scoring needs a pad token; set `tokenizer.pad_token = tokenizer.eos_token`.")
    ids = task_ids if task_ids is not None else range(len(tasks))
    total = sum(len(task.eval) + len(_asked(task)) for task in tasks)
    with _judging(model), bar(total, "scoring", "row", shown=progress) as shown:
        return [
            score
            for task_id, task in zip(ids, tasks, strict=True)
            for score in _score_task(model, tokenizer, task, task_id, batch_size, max_new_tokens, shown.update)
        ]


def _score_task(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: TaskData,
    task_id: int,
    batch_size: int,
    max_new_tokens: int,
    tick: Callable[[int], Any],
) -> Iterator[TaskScore]:
    limit = _context(model)
    encoded = [encode_row(example, tokenizer, limit) for example in task.eval]
    tick(encoded.count(None))
    rows = [row for row in encoded if row is not None]
    scored = score_rows(model, int(tokenizer.pad_token_id), rows, batch_size, tick, task_id)
    yield from _choice_scores(task.name, scored)
    if asked := _asked(task):
        options = {"limit": limit, "batch_size": batch_size, "max_new_tokens": max_new_tokens}
        answers = answer(model, tokenizer, asked, tick=tick, task_id=task_id, **options)
        pairs = [(given.strip(), e.completion.strip()) for given, e in zip(answers, asked, strict=True)]
        yield TaskScore.of_rows(task.name, "exact_match", [float(a == b) for a, b in pairs])
        yield TaskScore.of_rows(task.name, "token_f1", [token_f1(a, b) for a, b in pairs])
    if scored:
        losses = [one.nll / one.tokens for one in scored]
        yield TaskScore.of_rows(task.name, "perplexity", losses, [one.tokens for one in scored])


def _choice_scores(task: str, scored: Sequence[RowScore]) -> Iterator[TaskScore]:
    for metric, name in (("accuracy", "chosen"), ("accuracy_norm", "chosen_by_length")):
        if right := [float(hit) for one in scored if (hit := getattr(one, name)) is not None]:
            yield TaskScore.of_rows(task, metric, right)


def _asked(task: TaskData) -> list[Example]:
    """Rows that are answered in the model's own words."""
    return [example for example in task.eval if example.prompt is not None and not example.choices]


def _context(model: Any) -> int:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


@contextmanager
def _judging(model: Any) -> Iterator[None]:
    # A base model that is a mixture itself would compute its balancing loss, which fails with a key-value cache; TRL
    # asks for it.
    config = model.config.get_text_config()
    asked = getattr(config, "output_router_logits", None)
    try:
        if asked:
            config.output_router_logits = False
        with evaluating(model), torch.no_grad():
            yield
    finally:
        if asked:
            config.output_router_logits = asked
