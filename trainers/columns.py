"""Columns of a dataset that routing needs and models do not know: their way through collator and batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from molora.errors import MoloraError
from molora.routing.masks import prompt_of_labels

TASK_IDS = "task_ids"
"""Column with the index of each row's task; `[B]` in the batch."""

EXPERT_SCORES = "expert_scores"
"""Column with scores of the experts, `[E]` or `[S, E]` a row; `[B, E]` or `[B, S, E]` in the batch."""

PROMPT_MASK = "prompt_mask"
"""Column with true for each token of the prompt, `[S]` a row; `[B, S]` in the batch."""

COLUMNS = (TASK_IDS, EXPERT_SCORES, PROMPT_MASK)


def take_columns(inputs: Any) -> dict[str, Tensor]:
    """Take the routing columns out of a batch, so that they do not reach the model."""
    if not isinstance(inputs, MutableMapping):  # transformers' padding collators return a mapping that is no dict
        return {}
    return {name: inputs.pop(name) for name in COLUMNS if name in inputs}


def prompt_of_batch(inputs: Any) -> Tensor | None:
    """The prompt of each row of a batch, `[B, S]`, by its labels or the mask of its completions; `None` if unknown."""
    if not isinstance(inputs, Mapping):
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

    Attributes:
        collate: The other collator, which does not see these columns.
    """

    collate: Callable[[Any], Any]

    def __call__(self, rows: Sequence[Any]) -> Any:
        """Batch the rows; those that are no mappings, or are not made one batch of, are left to the collator."""
        names = [name for name in COLUMNS if rows and isinstance(rows[0], Mapping) and name in rows[0]]
        if not names:
            return self.collate(rows)
        for name in names:
            without = [index for index, row in enumerate(rows) if name not in row]
            if without:
                raise MoloraError(f"some rows have a {name} column and {len(without)} in this batch have none.")
        batch = self.collate([{key: row[key] for key in row if key not in names} for row in rows])
        if not isinstance(batch, MutableMapping):
            return self.collate(rows)
        for name in names:
            batch[name] = _per_row(_batched(name, [row[name] for row in rows], batch), rows, batch)
        return batch


def _batched(name: str, values: list[Any], batch: Mapping[str, Any]) -> Tensor:
    dtype = {TASK_IDS: torch.long, EXPERT_SCORES: torch.float32, PROMPT_MASK: torch.bool}[name]
    tensors = [torch.as_tensor(value, dtype=dtype) for value in values]
    per_token = tensors[0].ndim == {TASK_IDS: 1, EXPERT_SCORES: 2, PROMPT_MASK: 1}[name]
    if not per_token:
        return torch.stack(tensors)
    mask = batch.get("attention_mask")
    lengths = [len(tensor) for tensor in tensors]
    if not isinstance(mask, Tensor) or mask.sum(dim=-1).tolist() != lengths:
        raise MoloraError(
            f"the {name} column has {lengths} values in the rows of a batch, which must be one per token; the batch "
            "has " + (f"{mask.sum(dim=-1).tolist()} tokens." if isinstance(mask, Tensor) else "no attention_mask.")
        )
    # Wherever the padding is, the real tokens stand in their order.
    padded = torch.zeros(*mask.shape, *tensors[0].shape[1:], dtype=dtype)
    padded[mask.bool()] = torch.cat(tensors)
    return padded


def _per_row(values: Tensor, rows: Sequence[Mapping[str, Any]], batch: Mapping[str, Any]) -> Tensor:
    """Repeat the values of preference pairs: their batch holds all chosen answers, then all rejected ones."""
    ids = batch.get("input_ids")
    paired = all(any(str(key).startswith(side) for key in rows[0]) for side in ("chosen", "rejected"))
    if paired and isinstance(ids, Tensor) and len(ids) == 2 * len(rows) and len(values) == len(rows):
        return torch.cat([values, values])
    return values
