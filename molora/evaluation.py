"""Score a model on every task's evaluation rows, before and after training.

| rows | metric | value |
|---|---|---|
| with `choices` | `accuracy` | share of rows whose right choice has the highest summed log-likelihood, end included |
| with a prompt | `exact_match` | share of greedy answers equal to the reference, outer white space aside |
| with a prompt | `token_f1` | mean F1 of the answers' and references' white-space tokens, counted as bags |
| plain text | `perplexity` | exp of the mean negative log-likelihood a token; lower is better |

Likelihoods come from `molora.likelihood`, answers from `generate`. Routing that reads a task is given each task's
position, routing that reads scores those of the row.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.table import Table
from torch import nn
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from molora.data.formats import Example
from molora.data.mixture import TaskData
from molora.data.tokenize import encode_parts
from molora.errors import MoloraError
from molora.heads import generation_needs
from molora.likelihood import Prompted, log_likelihoods, pad_with_mask, routed
from molora.modes import evaluating

LOWER_IS_BETTER = ("perplexity",)


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task.

    Attributes:
        task: Name of the task.
        metric: `accuracy`, `exact_match`, `token_f1` or `perplexity`.
        value: The metric, a share between 0 and 1 except for `perplexity`.
        count: Rows scored.
    """

    task: str
    metric: str
    value: float
    count: int


def score_tasks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[TaskData],
    *,
    batch_size: int = 16,
    max_new_tokens: int = 64,
    progress: bool = True,
) -> list[TaskScore]:
    """Score the evaluation rows of every task that has some, leaving the model in the mode it was in.

    Args:
        model: A causal language model, plain or wrapped by PEFT.
        tokenizer: Its tokenizer, with a pad token.
        tasks: Only `eval` is read. A task's position is its id, as in training.
        batch_size: Prompts a batch.
        max_new_tokens: Longest generated answer.
        progress: Show a progress bar over the rows of all tasks.

    Returns:
        One score a task and metric, in the order of the tasks.

    Raises:
        MoloraError: The model is not a decoder-only language model with a key-value cache.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise MoloraError(f"scoring needs a decoder-only language model, got {type(model).__name__}.")
    total = sum(len(task.eval) for task in tasks)
    with _judging(model), tqdm(total=total, desc="scoring", unit="row", disable=not progress) as bar:
        return [
            score
            for task_id, task in enumerate(tasks)
            for score in _score_task(model, tokenizer, task, task_id, batch_size, max_new_tokens, bar.update)
        ]


def score_table(before: Sequence[TaskScore], after: Sequence[TaskScore]) -> Table:
    """Return a table of both scores and their difference, one line a task and metric of `after`."""
    earlier = {(score.task, score.metric): score for score in before}
    table = Table("task", "metric")
    for name in ("rows", "before", "after", "change"):
        table.add_column(name, justify="right")
    for score in after:
        old = earlier.get((score.task, score.metric))
        change = score.value - old.value if old else 0.0
        better = change < 0 if score.metric in LOWER_IS_BETTER else change > 0
        colour = "green" if better else "red" if change else "dim"
        cells = (f"{old.value:.3f}", f"[{colour}]{change:+.3f}[/]") if old else ("-", "-")
        table.add_row(score.task, score.metric, str(score.count), cells[0], f"{score.value:.3f}", cells[1])
    return table


def token_f1(answer: str, reference: str) -> float:
    """Return the F1 of two texts' white-space tokens, counted as bags; two empty texts agree."""
    given, wanted = Counter(answer.split()), Counter(reference.split())
    if not given or not wanted:
        return float(given == wanted)
    shared = (given & wanted).total()
    return 2 * shared / (given.total() + wanted.total())


def _score_task(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: TaskData,
    task_id: int,
    batch_size: int,
    max_new_tokens: int,
    tick: Callable[[int], Any],
) -> Iterator[TaskScore]:
    limit, pad = _context(model), int(tokenizer.pad_token_id)
    chosen = [example for example in task.eval if example.choices]
    texts = [example for example in task.eval if example.prompt is None and not example.choices]
    asked = [example for example in task.eval if example.prompt is not None and not example.choices]
    if chosen:
        given = [_choices(example, tokenizer, limit) for example in chosen]
        scores = log_likelihoods(model, pad, given, batch_size, tick, task_id)
        right = sum(row.index(max(row)) == e.label for row, e in zip(scores, chosen, strict=True))
        yield TaskScore(task.name, "accuracy", right / len(chosen), len(chosen))
    if asked:
        answers = _generate(model, tokenizer, asked, task_id, batch_size, max_new_tokens, tick)
        pairs = [(answer.strip(), e.completion.strip()) for answer, e in zip(answers, asked, strict=True)]
        yield TaskScore(task.name, "exact_match", sum(a == b for a, b in pairs) / len(pairs), len(pairs))
        yield TaskScore(task.name, "token_f1", sum(token_f1(a, b) for a, b in pairs) / len(pairs), len(pairs))
    if rows := [row for example in texts if (row := _text(example, tokenizer, limit)).completions[0]]:
        scores = log_likelihoods(model, pad, rows, batch_size, tick, task_id)
        tokens = sum(len(row.completions[0]) for row in rows)
        yield TaskScore(task.name, "perplexity", math.exp(-sum(score for [score] in scores) / tokens), len(rows))


def _choices(example: Example, tokenizer: PreTrainedTokenizerBase, limit: int) -> Prompted:
    parts = [encode_parts(replace(example, completion=choice), tokenizer) for choice in example.choices]
    completions = [completion for _, completion in parts]
    return Prompted(_tail(parts[0][0], limit - max(map(len, completions))), completions, example.expert_scores)


def _text(example: Example, tokenizer: PreTrainedTokenizerBase, limit: int) -> Prompted:
    # The first token of a text has nothing before it to be predicted from.
    start, text = encode_parts(example, tokenizer)
    ids = (start + text)[:limit]
    return Prompted(ids[:1], [ids[1:]], example.expert_scores)


def _generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    task_id: int,
    batch_size: int,
    max_new_tokens: int,
    tick: Callable[[int], Any],
) -> list[str]:
    """Return the greedy answer to each example's prompt."""
    room = _context(model) - max_new_tokens
    prompts = [_tail(encode_parts(example, tokenizer)[0], room) for example in examples]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
    config = _greedy(model, tokenizer, max_new_tokens)
    device = next(model.parameters()).device
    answers = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        ids, mask = pad_with_mask([prompts[index] for index in batch], int(tokenizer.pad_token_id), "left", device)
        with routed(model, task_id, [examples[index].expert_scores for index in batch]):
            output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        for index, row in zip(batch, output[:, ids.shape[1] :], strict=True):
            answers[index] = str(tokenizer.decode(row, skip_special_tokens=True))
        tick(len(batch))
    return answers


def _greedy(model: nn.Module, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> GenerationConfig:
    """Return plain greedy decoding, whatever sampling the model's own generation settings ask for."""
    own = getattr(model, "generation_config", None)
    ends = own.eos_token_id if own is not None and own.eos_token_id is not None else []
    ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        use_cache=generation_needs(model).get("use_cache", True),
        eos_token_id=sorted(ends) or None,
        pad_token_id=tokenizer.pad_token_id,
    )


def _tail(prompt: list[int], room: int) -> list[int]:
    """Return the end of a prompt that fits, at least its last token."""
    return prompt[-max(room, 1) :]


def _context(model: Any) -> int:
    return getattr(model.config, "max_position_embeddings", None) or sys.maxsize


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
