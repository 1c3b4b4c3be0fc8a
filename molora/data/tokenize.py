"""Turn examples into token ids whose labels cover the completion only.

Messages go through the tokenizer's chat template, plain text does not. The prompt is encoded exactly as it is at
generation time, and the completion is what follows it in the encoding of both together, up to and including the token
that ends the turn: the tokens the model must produce, no more.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from datasets import Dataset
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from molora.data.formats import Example
from molora.data.mixture import TaskData
from molora.errors import DataError
from molora.progress import tracked

logger = logging.getLogger(__name__)

IGNORED = -100


@dataclass(frozen=True)
class TokenizedTask:
    """The rows of one task as the model will see them.

    Attributes:
        name: Name of the task.
        dataset: Columns `input_ids`, `labels` (lists of ids), `task_ids` (the task's index) and, if the examples have
            some, `expert_scores`.
        supervised_tokens: Positions the loss is computed at, over all rows.
        truncated: Rows that were cut to the maximum length.
        dropped: Rows left out because nothing in them can be learned: an empty completion, or one so long that nothing
            of its prompt is left.
    """

    name: str
    dataset: Dataset
    supervised_tokens: int
    truncated: int
    dropped: int


def tokenize_tasks(
    tasks: Sequence[TaskData],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    split: Literal["train", "eval"] = "train",
) -> list[TokenizedTask]:
    """Encode one split of every task that has rows in it.

    Args:
        tasks: Their positions become the `task_ids`.
        tokenizer: Encodes; its chat template renders messages.
        max_length: Longest row in tokens; None for no limit.
        split: Which examples to encode.

    Raises:
        DataError: A task has no token to learn from, or its messages cannot be rendered.
    """
    encoded = []
    for index, task in enumerate(tasks):
        examples = task.train if split == "train" else task.eval
        if examples:
            encoded.append(_tokenize(task.name, index, examples, tokenizer, max_length))
    return encoded


def encode(example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> dict[str, list[int]]:
    """Encode one example.

    Too long a row loses the start of its prompt, so that the completion stays; a completion that alone is too long
    loses its end.

    Returns:
        `input_ids` and `labels`, equally long; labels are -100 on the prompt.
    """
    return _fit(*encode_parts(example, tokenizer), max_length)


def encode_parts(example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the ids of the prompt, as at generation time, and of the completion with the end of its turn.

    A text without prompt is all completion; its prompt is the begin-of-text token where the tokenizer adds one.

    Raises:
        DataError: Messages are given and the chat template is missing or cannot render them.
    """
    start = _start_ids(tokenizer)
    if example.prompt is None:
        return start, _ids(example.completion, tokenizer) + _end_ids(tokenizer)
    if isinstance(example.prompt, str):
        prompt, completion = _split_ids(example.prompt, example.completion, tokenizer)
        return start + prompt, completion + _end_ids(tokenizer)
    rendered, answer = _render(example, example.prompt, tokenizer)
    prompt, completion = _split_ids(rendered, answer, tokenizer)
    return prompt, _until_end_of_turn(completion, tokenizer)


def format_preview(
    example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> tuple[str, str]:
    """Return what the model sees of an example, decoded with all markers: the prompt, then what it learns to write."""
    row = encode(example, tokenizer, max_length)
    split = row["labels"].count(IGNORED)
    ids = row["input_ids"]
    return str(tokenizer.decode(ids[:split])), str(tokenizer.decode(ids[split:]))


def supervised_tokens(labels: Sequence[int]) -> int:
    """Count the labels that enter the loss; the first never does, as nothing precedes it."""
    return sum(label != IGNORED for label in labels[1:])


def _tokenize(
    name: str, index: int, examples: list[Example], tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> TokenizedTask:
    rows: list[dict[str, Any]] = []
    total, truncated = 0, 0
    for example in tracked(examples, f"tokenising {name}", "row"):
        prompt, completion = encode_parts(example, tokenizer)
        row: dict[str, Any] = {**_fit(prompt, completion, max_length), "task_ids": index}
        if example.expert_scores:
            row["expert_scores"] = list(example.expert_scores)
        # An empty answer teaches only to stop, and an answer whose whole prompt was cut away answers nothing.
        pointless = not example.completion.strip() or (prompt and row["labels"][0] != IGNORED)
        if (count := supervised_tokens(row["labels"])) and not pointless:
            rows.append(row)
            total += count
            truncated += len(row["labels"]) < len(prompt) + len(completion)
    if not rows:
        raise DataError(
            f"task {name!r}: none of its {len(examples)} rows has a token to learn: the completions are empty, or "
            f"max_length={max_length} leaves nothing of the prompts."
        )
    dropped = len(examples) - len(rows)
    if truncated or dropped:
        logger.info("task %s: %d of %d rows cut to %s tokens, %d empty rows left out", name, truncated, len(examples),
                    max_length, dropped)  # fmt: skip
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    return TokenizedTask(name, Dataset.from_dict(columns), total, truncated, dropped)


def _fit(prompt: list[int], completion: list[int], max_length: int | None) -> dict[str, list[int]]:
    if max_length is not None:
        completion = completion[:max_length]
        prompt = prompt[max(len(prompt) + len(completion) - max_length, 0) :]
    return {"input_ids": prompt + completion, "labels": [IGNORED] * len(prompt) + completion}


def _render(example: Example, prompt: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Return the prompt as text up to where the model takes over, and the text it must continue with."""
    if not tokenizer.chat_template:
        raise DataError(
            f"task {example.task!r} has messages, but the tokenizer has no chat template: use an instruct model, save "
            "a template with the tokenizer, or give `prompt` and `completion` as plain text."
        )
    answered = [*prompt, {"role": "assistant", "content": example.completion}]
    try:
        before = str(tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True))
        both = str(tokenizer.apply_chat_template(answered, tokenize=False))
    except TemplateError as error:
        raise DataError(f"task {example.task!r}: the chat template refuses the messages: {error}.") from error
    if not both.startswith(before):
        raise DataError(
            f"task {example.task!r}: the chat template renders the prompt differently once an answer follows, so the "
            "answer's tokens are not those generated later; give `prompt` and `completion` as plain text."
        )
    return before, both[len(before) :]


def _split_ids(prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    before, both = _ids(prompt, tokenizer), _ids(prompt + completion, tokenizer)
    if both[: len(before)] == before:
        return before, both[len(before) :]
    # A token spans the boundary. At generation time the prompt is encoded alone, so the completion is too.
    return before, _ids(completion, tokenizer)


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    start = tokenizer.bos_token_id
    return [start] if start is not None and tokenizer("")["input_ids"][:1] == [start] else []


def _end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _until_end_of_turn(completion: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Drop the white space a template writes after the end-of-turn token, which generation never reaches.

    A template without such a token gets the end-of-text token, else the model would never learn to stop.
    """
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends = [position for position, token in enumerate(completion) if token in special]
    if ends and not str(tokenizer.decode(completion[ends[-1] + 1 :])).strip():
        return completion[: ends[-1] + 1]
    return completion + _end_ids(tokenizer)
