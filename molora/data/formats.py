"""Turn a row of any accepted shape into examples: what the model is given and what it must answer.

| shape | columns | becomes |
|---|---|---|
| conversation | `messages`: list of `{role, content}` | one example an assistant turn, prompted by all before it |
| prompt and answer | `prompt`, `completion`: both text, or lists of messages | one example an assistant turn |
| plain text | `text` | one example without prompt |

A row may also carry `choices`, the allowed answers, and `label`, the index of the right one; and `expert_scores`, a
number per expert, for routing that reads them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from molora.data.rows import Row
from molora.errors import DataError

SHAPES = "`messages`, `prompt` with `completion`, or `text`"

Message = dict[str, str]


@dataclass(frozen=True)
class Example:
    """One prompt and the completion to learn.

    Attributes:
        prompt: Messages for the chat template, plain text, or None when the completion stands alone.
        completion: What the model must write, without any end-of-turn marker.
        task: Name of the task.
        choices: The allowed completions; empty when any text may follow.
        label: Index of the completion in `choices`; -1 without choices.
        expert_scores: A number per expert, for routing that reads them; empty if the row has none.
        where: The row it comes from, for messages.
    """

    prompt: list[Message] | str | None
    completion: str
    task: str
    choices: tuple[str, ...] = ()
    label: int = -1
    expert_scores: tuple[float, ...] = ()
    where: str = field(default="", compare=False)


def examples_of(row: Row, task: str) -> list[Example]:
    """Return the examples in one row, all under the given task name.

    `choices` belong to the last assistant turn of a row; earlier turns get none. `expert_scores` belong to all.

    Raises:
        DataError: The row has none of the accepted shapes, or its values contradict each other.
    """
    pairs = _prompts_and_completions(row)
    choices, label = _choices(row, *pairs[-1])
    scores = _scores(row)
    last = len(pairs) - 1
    return [
        Example(prompt, completion, task, *((choices, label) if index == last else ((), -1)), scores, row.where)
        for index, (prompt, completion) in enumerate(pairs)
    ]


def _prompts_and_completions(row: Row) -> list[tuple[list[Message] | str | None, str]]:
    values = {name: value for name, value in row.values.items() if value is not None}
    if "messages" in values:
        return _assistant_turns(_messages(values["messages"], "messages", row.where), 0, row.where)
    if "prompt" in values and "completion" in values:
        return _from_prompt(values["prompt"], values["completion"], row.where)
    if "text" in values:
        if not isinstance(values["text"], str):
            raise DataError(f"{row.where}: `text` must be text, got {type(values['text']).__name__}.")
        return [(None, values["text"])]
    columns = ", ".join(f"`{name}`" for name in values) or "none"
    raise DataError(f"{row.where}: columns found: {columns}; accepted are {SHAPES}. Rename or convert the columns.")


def _from_prompt(prompt: Any, completion: Any, where: str) -> list[tuple[list[Message] | str | None, str]]:
    if prompt == "":
        raise DataError(f"{where}: `prompt` is empty; give text that follows nothing as `text`.")
    if isinstance(prompt, str) and isinstance(completion, str):
        return [(prompt, completion)]
    if isinstance(prompt, str):
        raise DataError(f"{where}: `prompt` is text, so `completion` must be too, got {type(completion).__name__}.")
    given = _messages(prompt, "prompt", where)
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    return _assistant_turns(given + _messages(completion, "completion", where), len(given), where)


def _messages(value: Any, column: str, where: str) -> list[Message]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise DataError(f"{where}: `{column}` must be a list of messages, each with `role` and `content`.")
    for number, message in enumerate(value, start=1):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise DataError(
                f"{where}: message {number} in `{column}` must have `role` and `content`, got {message!r}."
            )
        if not isinstance(message["content"], str) or not isinstance(message["role"], str):
            raise DataError(f"{where}: message {number} in `{column}`: `role` and `content` must be text.")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _assistant_turns(messages: list[Message], start: int, where: str) -> list[tuple[list[Message] | str | None, str]]:
    """Split a conversation into one pair an assistant turn at or after index `start`."""
    if messages[-1]["role"] != "assistant":
        raise DataError(f"{where}: the last message must be the assistant's, got role {messages[-1]['role']!r}.")
    if messages[0]["role"] == "assistant":
        raise DataError(f"{where}: the first message is the assistant's, so nothing prompts it.")
    turns = [index for index in range(start, len(messages)) if messages[index]["role"] == "assistant"]
    return [(messages[:index], messages[index]["content"]) for index in turns]


def _choices(row: Row, prompt: list[Message] | str | None, completion: str) -> tuple[tuple[str, ...], int]:
    choices = row.values.get("choices") or ()
    # Without choices a `label` column means something else, e.g. the class id of a hub dataset.
    if not choices:
        return (), -1
    if isinstance(choices, str) or not all(isinstance(choice, str) for choice in choices):
        raise DataError(f"{row.where}: `choices` must be a list of texts.")
    if prompt is None:
        raise DataError(f"{row.where}: `choices` need a prompt to choose after; give `prompt` and `completion`.")
    label = row.values.get("label")
    if label is None or label == -1:
        if completion not in choices:
            raise DataError(f"{row.where}: the completion {completion!r} is none of its `choices`.")
        return tuple(choices), list(choices).index(completion)
    if not isinstance(label, int) or not 0 <= label < len(choices):
        raise DataError(f"{row.where}: `label` must be between 0 and {len(choices) - 1}, got {label!r}.")
    if choices[label] != completion:
        raise DataError(f"{row.where}: `label` {label} means {choices[label]!r} but the completion is {completion!r}.")
    return tuple(choices), label


def _scores(row: Row) -> tuple[float, ...]:
    scores = row.values.get("expert_scores")
    if scores is None:
        return ()
    usable = isinstance(scores, Sequence) and not isinstance(scores, str) and len(scores) > 0
    if not usable or not all(isinstance(score, int | float) and math.isfinite(score) for score in scores):
        raise DataError(f"{row.where}: `expert_scores` must be a list of numbers, one per expert.")
    return tuple(map(float, scores))
