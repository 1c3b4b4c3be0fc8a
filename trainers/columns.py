"""Columns of a dataset that routing needs and models do not know: their way through collator and batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from molora.errors import MoloraError
from molora.routing.masks import prompt_of_labels
from molora.trainers.packing import SEQ_LENGTHS, TokenLayout, layout_of

TASK_IDS = "task_ids"
"""Column with the index of each row's task; `[B]` in the batch."""

EXPERT_SCORES = "expert_scores"
"""Column with scores of the experts, `[E]` or `[S, E]` a row; `[B, E]` or `[B, S, E]` in the batch."""

PROMPT_MASK = "prompt_mask"
"""Column with true for each token of the prompt, `[S]` a row; `[B, S]` in the batch."""

COLUMNS = (TASK_IDS, EXPERT_SCORES, PROMPT_MASK)

TASKS_OF_TOKENS = "task_ids_of_tokens"
"""In a batch with several examples in a row: the task of each token, `[B, S]`. The `task_ids` are then `[N]`."""

PACKED_ROWS = "packed_rows"
"""In such a batch: positions of the tokens of each example among all B·S, `[N, M]`, -1 behind its end."""


def take_columns(inputs: Any) -> dict[str, Tensor]:
    """Take the routing columns out of a batch, so that they do not reach the model."""
    if not isinstance(inputs, MutableMapping):  # transformers' padding collators return a mapping that is no dict
        return {}
    names = [name for name in (*COLUMNS, TASKS_OF_TOKENS, PACKED_ROWS) if name in inputs]
    if "prompt_ids" in inputs and PROMPT_MASK in names:  # that of TRL's, for a prompt apart from its answer
        names.remove(PROMPT_MASK)
    return {name: inputs.pop(name) for name in names}


def prompt_of_batch(inputs: Any) -> Tensor | None:
    """The prompt of each row of a batch, `[B, S]`, by its labels or the mask of its completions; `None` if unknown."""
    # KTO runs other answers to the same prompts, of other lengths; its model is told the labels of each pass.
    if not isinstance(inputs, Mapping) or "KL_input_ids" in inputs:
        return None
    labels, completion = inputs.get("labels"), inputs.get("completion_mask")
    if labels is None and isinstance(completion, Tensor):
        labels = torch.where(completion.bool(), 0, -100)
    mask, ids = inputs.get("attention_mask"), inputs.get("input_ids")
    if not isinstance(labels, Tensor) or not isinstance(ids, Tensor) or labels.ndim != 2 or labels.shape != ids.shape:
        return None
    return prompt_of_labels(labels, mask)


@dataclass(frozen=True)
class ColumnCollator:
    """Batches the routing columns beside whatever another collator makes of the rest.

    Where a row of the batch holds several examples, the batch gets one task for each example, `task_ids_of_tokens`
    for the routers, scores and prompts of each token, and `packed_rows`, with or without columns.

    Attributes:
        collate: The other collator, which does not see these columns.
    """

    collate: Callable[[Any], Any]

    def __call__(self, rows: Sequence[Any]) -> Any:
        """Batch the rows; those that are no mappings, or are not made one batch of, are left to the collator."""
        if not rows or not isinstance(rows[0], Mapping):
            return self.collate(rows)
        names = [name for name in COLUMNS if any(row.get(name) is not None for row in rows)]
        for name in names:
            without = [index for index, row in enumerate(rows) if row.get(name) is None]
            if without:
                raise MoloraError(f"some rows have a {name} column and {len(without)} in this batch have none.")
        batch = self.collate([{key: row[key] for key in row if key not in names} for row in rows])
        if not isinstance(batch, MutableMapping):
            return self.collate(rows)
        layout = layout_of(rows, batch)
        for name in names:
            values = _batched(name, [row[name] for row in rows], layout, batch)
            batch[name] = values if layout is not None else _per_row(values, rows, batch)
        if layout is not None and layout.packed:
            batch[PACKED_ROWS] = layout.packed_rows()
            if TASK_IDS in names:
                batch[TASKS_OF_TOKENS] = layout.at_tokens(layout.over_tokens(batch[TASK_IDS]))
        return batch


def is_per_token(name: str, value: Any) -> bool:
    """Whether a value of a routing column is one for each token of its row, not one for the whole row."""
    return torch.as_tensor(value).ndim == {TASK_IDS: 1, EXPERT_SCORES: 2, PROMPT_MASK: 1}[name]


def _batched(name: str, given: list[Any], layout: TokenLayout | None, batch: Mapping[str, Any]) -> Tensor:
    """A column as the batch has it: `[B, ...]` or `[N, ...]`, or at its tokens, `[B, S, ...]`."""
    dtype = {TASK_IDS: torch.long, EXPERT_SCORES: torch.float32, PROMPT_MASK: torch.bool}[name]
    tensors = [torch.as_tensor(value, dtype=dtype) for value in given]
    if not is_per_token(name, given[0]):
        values = torch.stack(tensors)
        if layout is None or not layout.packed:
            return values
        values = layout.over_examples(values)
        return values if name == TASK_IDS else layout.at_tokens(layout.over_tokens(values))
    lengths = [len(tensor) for tensor in tensors]
    if layout is None or layout.row_lengths() != lengths:
        mask = batch.get("attention_mask")
        has = "no attention_mask" if not isinstance(mask, Tensor) else f"{mask.sum(dim=-1).tolist()} tokens"
        raise MoloraError(
            f"the {name} column has {lengths} values in the rows of a batch, which must be one per token; the batch "
            f"has {has}."
        )
    values = torch.cat(tensors)
    return _of_examples(values, layout) if name == TASK_IDS else layout.at_tokens(values)


def _of_examples(values: Tensor, layout: TokenLayout) -> Tensor:
    """The task of each example, `[N]`, by those of its tokens."""
    of_examples = torch.stack(
        [tasks[0] if len(tasks) else values.new_zeros(()) for tasks in values.split(layout.lengths)]
    )
    if not torch.equal(layout.over_tokens(of_examples), values):
        raise MoloraError(
            "the task_ids column changes within an example; an example has one task. If rows are packed, they need a "
            f"{SEQ_LENGTHS} column that says where examples end, as packing_strategy='bfd' makes it."
        )
    return of_examples


def _per_row(values: Tensor, rows: Sequence[Mapping[str, Any]], batch: Mapping[str, Any]) -> Tensor:
    """Repeat the values of preference pairs: their batch holds all chosen answers, then all rejected ones."""
    ids = batch.get("input_ids")
    paired = all(any(str(key).startswith(side) for key in rows[0]) for side in ("chosen", "rejected"))
    if paired and isinstance(ids, Tensor) and len(ids) == 2 * len(rows) and len(values) == len(rows):
        return torch.cat([values, values])
    return values
