"""Summed log-likelihood of completions after a prompt, as cheap as a forward over the distinct tokens.

Each prompt is read once and its key-value cache shared by all its completions; logits are computed at the
completions' positions only. With 20 choices a row that is several times less work than one sequence a choice.

What routing decides about a whole sequence it decides when the prompt is read, and the completions follow it, as in
generation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from molora.data.collate import Side, pad_rows
from molora.errors import MoloraError
from molora.heads import generation_needs, last_logits_only
from molora.routing.inputs import continuing_rows, routing_inputs, scopes

# Completion positions scored in one forward: the fp32 copy of their logits stays near 200 MB at a vocabulary of 50k.
POSITIONS = 1024


@dataclass(frozen=True)
class Prompted:
    """A prompt and the completions to score after it, as token ids.

    Attributes:
        prompt: At least one token.
        completions: What may follow.
        expert_scores: A number per expert, for routing that reads them; may be empty.
    """

    prompt: list[int]
    completions: list[list[int]]
    expert_scores: tuple[float, ...] = ()


@dataclass(frozen=True)
class Likelihood:
    """What a model thinks of a completion.

    Attributes:
        total: Summed log-probability of its tokens, nats.
        greedy: Whether each of them is the model's own choice after those before it.
    """

    total: float
    greedy: bool


def likelihoods(
    model: Any,
    pad: int,
    rows: Sequence[Prompted],
    batch_size: int,
    tick: Callable[[int], Any],
    task_id: int | None = None,
) -> list[list[Likelihood]]:
    """Return, for each row, what the model thinks of each of its completions.

    Args:
        model: A causal language model in evaluation mode.
        pad: Fills up rows.
        rows: Prompts and completions; all have expert scores or none.
        batch_size: Prompts a batch.
        tick: Told how many rows are done.
        task_id: The task of all rows, for routing that reads it.

    Raises:
        MoloraError: The model's logits are NaN.
    """
    results: list[list[Likelihood]] = [[] for _ in rows]
    uncached = generation_needs(model).get("use_cache") is False
    for batch in _batches(rows, batch_size):
        given = [rows[index] for index in batch]
        if not uncached:
            try:
                scores = _score_cached(model, pad, given, task_id)
            except _NoCache:
                uncached = True
        if uncached:
            scores = _score_uncached(model, pad, given, task_id)
        for index in batch:
            results[index] = [scores.pop(0) for _ in rows[index].completions]
        tick(len(batch))
    return results


def _batches(rows: Sequence[Prompted], batch_size: int) -> Iterator[list[int]]:
    """Group rows of similar length, with at most `batch_size` prompts and about `POSITIONS` completion tokens."""
    batch: list[int] = []
    count, longest = 0, 0
    for index in sorted(range(len(rows)), key=lambda index: len(rows[index].prompt), reverse=True):
        count += len(rows[index].completions)
        longest = max(longest, *map(len, rows[index].completions))
        if batch and (len(batch) == batch_size or count * longest > POSITIONS):
            yield batch
            batch, count = [], len(rows[index].completions)
            longest = max(map(len, rows[index].completions))
        batch.append(index)
    yield batch


def routed(
    model: Any, task_id: int | None, expert_scores: Sequence[Sequence[float]] = ()
) -> AbstractContextManager[None]:
    """Open a block for one batch of prompts and what follows them.

    Routing finds their task and scores in it, and keeps to what it decided about each prompt.

    Args:
        model: Any model; one without molora layers needs nothing.
        task_id: The task of all rows.
        expert_scores: Those of each row, `[B, E]`; nothing is given if they are empty.
    """
    if not scopes(model):
        return nullcontext()
    return routing_inputs(model, **_given(next(model.parameters()).device, task_id, expert_scores), generating=True)


def _given(device: torch.device, task_id: int | None, expert_scores: Sequence[Sequence[float]]) -> dict[str, Any]:
    """What routing reads about rows; expert scores are [B, E]."""
    return {
        "task_ids": None if task_id is None else torch.tensor([task_id], device=device),
        "expert_scores": torch.tensor(expert_scores, device=device) if any(map(len, expert_scores)) else None,
    }


def _score_cached(model: Any, pad: int, rows: Sequence[Prompted], task_id: int | None) -> list[Likelihood]:
    with routed(model, task_id, [row.expert_scores for row in rows]):
        return _score_batch(model, pad, rows)


class _NoCache(Exception):
    """A model keeps no cache whose rows could be repeated, as one with a recurrent state."""


def _score_uncached(model: Any, pad: int, rows: Sequence[Prompted], task_id: int | None) -> list[Likelihood]:
    """The same for models or routing that leave no room for a cache: one whole sequence a completion, [C, P + L]."""
    device = next(model.parameters()).device
    pairs = [(row, ids) for row in rows for ids in row.completions]
    ids, mask = pad_with_mask([row.prompt + completion for row, completion in pairs], pad, "left", device)
    targets, known = pad_with_mask([completion for _, completion in pairs], pad, "left", device)
    width = targets.shape[1]
    prompt_mask = mask.bool()
    prompt_mask[:, -width:] &= ~known.bool()
    scores = [row.expert_scores for row, _ in pairs]
    given = _given(device, task_id, scores) | {"prompt_mask": prompt_mask}
    with routing_inputs(model, **given) if scopes(model) else nullcontext():
        logits = model(input_ids=ids, attention_mask=mask, position_ids=_positions(mask), use_cache=False).logits
    total, chosen = _judged(logits[:, -width - 1 : -1], targets)
    return _summed(total, chosen, known)


def _score_batch(model: Any, pad: int, rows: Sequence[Prompted]) -> list[Likelihood]:
    """Return what the model thinks of every completion of every row, in order.

    The prompts [B, P] are read once. Their cache rows are then repeated for the C completions of the batch, whose
    tokens but the last [C, L-1] are read on top.
    """
    device = next(model.parameters()).device
    ids, mask = pad_with_mask([row.prompt for row in rows], pad, "left", device)
    output = model(
        input_ids=ids, attention_mask=mask, position_ids=_positions(mask), use_cache=True, **last_logits_only(model)
    )
    owner = torch.tensor([index for index, row in enumerate(rows) for _ in row.completions], device=device)
    targets, target_mask = pad_with_mask([ids for row in rows for ids in row.completions], pad, "right", device)
    total, chosen = _judged(output.logits[:, -1:][owner], targets[:, :1])
    if targets.shape[1] > 1:
        cache: Any = getattr(output, "past_key_values", None)
        if not hasattr(cache, "batch_select_indices"):
            raise _NoCache
        cache.batch_select_indices(owner)
        read = target_mask[:, :-1]
        positions = mask.sum(dim=1)[owner, None] + torch.arange(read.shape[1], device=device)
        positions = positions * read  # padding behind a long prompt may be farther than there are positions
        with continuing_rows(model, owner):
            logits = model(
                input_ids=targets[:, :-1],
                attention_mask=torch.cat([mask[owner], read], dim=1),
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            ).logits
        later, also_chosen = _judged(logits, targets[:, 1:])
        total, chosen = torch.cat([total, later], dim=1), torch.cat([chosen, also_chosen], dim=1)
    return _summed(total, chosen, target_mask)


def _summed(total: torch.Tensor, chosen: torch.Tensor, known: torch.Tensor) -> list[Likelihood]:
    """Sum over the known tokens [C, L] of each completion."""
    # Not multiplied: the likelihood of padding may be no number.
    totals, greedy = total.masked_fill(~known.bool(), 0.0).sum(dim=1), (chosen | ~known.bool()).all(dim=1)
    if bool(totals.isnan().any()):
        raise MoloraError(
            "the model's answers are NaN, so there is nothing to score. If it was trained, its training diverged: "
            "lower the learning rate. Else load it in another dtype; float16 overflows in models made for bfloat16."
        )
    return [Likelihood(*pair) for pair in zip(totals.tolist(), greedy.tolist(), strict=True)]


def _judged(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each target [C, L] under its logits [C, L, V]: its log-probability in fp32, and whether it is the likeliest."""
    logits = logits.float()
    own = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return own - logits.logsumexp(dim=-1), logits.argmax(dim=-1) == targets


def pad_with_mask(
    rows: Sequence[Sequence[int]], fill: int, side: Side, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and attention mask [B, S]."""
    mask = pad_rows([[1] * len(row) for row in rows], 0, side)
    return pad_rows(rows, fill, side).to(device), mask.to(device)


def _positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(dim=1) - 1).clamp(min=0)
