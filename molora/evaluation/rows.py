"""Rows as token ids, and what a model makes of each: how likely the right answer is, and which choice is likeliest.

Training, `molora eval` and the quality bench all score with this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from molora.data.formats import Example
from molora.data.tokenize import encode_parts
from molora.evaluation.metrics import likeliest
from molora.likelihood import Likelihood, Prompted, likelihoods


@dataclass(frozen=True)
class EncodedRow:
    """A prompt and what may follow it, as token ids.

    Attributes:
        prompt: At least one token.
        completions: The choices, or the right completion alone.
        label: Index of the right one.
        characters: Of each choice, for accuracies by length; empty if nothing is chosen.
        expert_scores: A number per expert, for routing that reads them; may be empty.
    """

    prompt: Sequence[int]
    completions: Sequence[Sequence[int]]
    label: int = 0
    characters: Sequence[int] = ()
    expert_scores: tuple[float, ...] = ()


@dataclass(frozen=True)
class RowScore:
    """What a model makes of one row.

    Attributes:
        nll: Negative log-likelihood of the right completion, nats.
        tokens: Tokens of the right completion.
        greedy: Whether each of them is what the model would have written after those before it.
        chosen: Whether the right choice is the likeliest; `None` if nothing is chosen.
        chosen_by_length: The same by log-likelihood a character.
    """

    nll: float
    tokens: int
    greedy: bool
    chosen: bool | None = None
    chosen_by_length: bool | None = None


def encode_row(example: Example, tokenizer: PreTrainedTokenizerBase, limit: int) -> EncodedRow | None:
    """Encode an example as in training; a prompt loses its start where the context ends, and then an answer its end.

    Args:
        example: The row.
        tokenizer: The model's tokenizer.
        limit: Tokens the model can read.

    Returns:
        The row; `None` if there is no token to score, as of a text of one, which nothing comes before, or an empty
        answer where the tokenizer has no token for the end.
    """
    if example.choices:
        parts = [encode_parts(replace(example, completion=choice), tokenizer) for choice in example.choices]
        completions = [completion[: limit - 1] for _, completion in parts]
        if not all(completions):
            return None
        prompt = tail(parts[0][0], limit - max(map(len, completions)))
        characters = [len(choice) for choice in example.choices]
        return EncodedRow(prompt, completions, example.label, characters, example.expert_scores)
    prompt, completion = encode_parts(example, tokenizer)
    if example.prompt is None:
        ids = (prompt + completion)[:limit]
        prompt, completion = ids[:1], ids[1:]
    completion = completion[: limit - 1]
    if not completion:
        return None
    return EncodedRow(tail(prompt, limit - len(completion)), [completion], expert_scores=example.expert_scores)


def score_rows(
    model: Any,
    pad: int,
    rows: Sequence[EncodedRow],
    batch_size: int,
    tick: Callable[[int], Any] = lambda _: None,
    task_id: int | None = None,
) -> list[RowScore]:
    """Score rows; arguments as of `molora.likelihood.likelihoods`, which runs the model."""
    prompted = [Prompted(list(row.prompt), [list(ids) for ids in row.completions], row.expert_scores) for row in rows]
    found = likelihoods(model, pad, prompted, batch_size, tick, task_id) if rows else []
    return [_judged(row, of_row) for row, of_row in zip(rows, found, strict=True)]


def _judged(row: EncodedRow, found: Sequence[Likelihood]) -> RowScore:
    right, totals = found[row.label], [one.total for one in found]
    scored = RowScore(-right.total, len(row.completions[row.label]), right.greedy)
    if not row.characters:
        return scored
    by_length = likeliest(totals, row.characters) == row.label
    return replace(scored, chosen=likeliest(totals) == row.label, chosen_by_length=by_length)


def tail(prompt: Sequence[int], room: int) -> list[int]:
    """Return the end of a prompt that fits, at least its last token."""
    return list(prompt[-max(room, 1) :])
