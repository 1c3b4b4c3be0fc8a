"""Pad encoded rows to a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from molora.data.tokenize import IGNORED

Side = Literal["left", "right"]


@dataclass(frozen=True)
class TaskCollator:
    """Batch rows with `input_ids`, `labels` and, optionally, `task_ids` and `expert_scores`.

    Attributes:
        pad_token_id: Fills `input_ids`; the attention mask is 0 and the label -100 there, whatever this id is.
        padding_side: `"right"` for training, `"left"` where generation follows.
        pad_to_multiple_of: Round the padded length up to a multiple of this.
    """

    pad_token_id: int
    padding_side: Side = "right"
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Return `input_ids`, `attention_mask` and `labels` [B, S].

        When every row has them, also `task_ids` [B] and `expert_scores` [B, E].
        """
        length = max(len(row["input_ids"]) for row in rows)
        if self.pad_to_multiple_of:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        batch = {
            "input_ids": pad_rows([row["input_ids"] for row in rows], self.pad_token_id, self.padding_side, length),
            "attention_mask": pad_rows([[1] * len(row["input_ids"]) for row in rows], 0, self.padding_side, length),
            "labels": pad_rows([row["labels"] for row in rows], IGNORED, self.padding_side, length),
        }
        if all("task_ids" in row for row in rows):
            batch["task_ids"] = torch.tensor([row["task_ids"] for row in rows], dtype=torch.long)
        if all("expert_scores" in row for row in rows):
            batch["expert_scores"] = torch.tensor([row["expert_scores"] for row in rows], dtype=torch.float32)
        return batch


def pad_rows(rows: Sequence[Sequence[int]], fill: int, side: Side, length: int | None = None) -> torch.Tensor:
    """Return the rows as one tensor [B, S], filled up at one side to `length` or the longest row."""
    length = max(map(len, rows)) if length is None else length
    padded = torch.full((len(rows), length), fill, dtype=torch.long)
    for index, row in enumerate(rows):
        start = length - len(row) if side == "left" else 0
        padded[index, start : start + len(row)] = torch.as_tensor(row, dtype=torch.long)
    return padded
