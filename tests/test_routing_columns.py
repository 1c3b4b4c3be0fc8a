"""The routing columns of a dataset: past collators that do not know them, and where the prompt of a batch ends."""

from __future__ import annotations

import pytest
import torch

from molora.errors import MoloraError
from molora.trainers.columns import ColumnCollator, prompt_of_batch, take_columns


def padded(rows):
    """A collator that knows `input_ids` only, and pads to the left."""
    length = max(len(row["input_ids"]) for row in rows)
    assert all(set(row) <= {"input_ids", "chosen_ids", "rejected_ids"} for row in rows)
    mask = torch.tensor([[0] * (length - len(row["input_ids"])) + [1] * len(row["input_ids"]) for row in rows])
    return {"input_ids": mask * 7, "attention_mask": mask}


def test_routing_columns_pass_a_collator_that_does_not_know_them():
    rows = [
        {"input_ids": [1, 2, 3], "task_ids": 1, "expert_scores": [0.5, 1.0], "prompt_mask": [1, 1, 0]},
        {"input_ids": [4], "task_ids": 0, "expert_scores": [0.0, 2.0], "prompt_mask": [1]},
    ]
    batch = ColumnCollator(padded)(rows)
    taken = take_columns(batch)
    assert set(batch) == {"input_ids", "attention_mask"}
    assert taken["task_ids"].tolist() == [1, 0]
    assert taken["expert_scores"].tolist() == [[0.5, 1.0], [0.0, 2.0]]
    assert taken["prompt_mask"].tolist() == [[True, True, False], [False, False, True]]


def test_scores_of_tokens_stand_where_the_tokens_do():
    rows = [{"input_ids": [1, 2], "expert_scores": [[1.0], [2.0]]}, {"input_ids": [3], "expert_scores": [[3.0]]}]
    assert ColumnCollator(padded)(rows)["expert_scores"].squeeze(-1).tolist() == [[1, 2], [0, 3]]
    rows[0]["expert_scores"].append([4.0])
    with pytest.raises(MoloraError, match="one per token"):
        ColumnCollator(padded)(rows)


def test_preference_pairs_repeat_the_columns_of_their_row():
    rows = [{"input_ids": [1], "chosen_ids": [2], "rejected_ids": [3], "task_ids": task} for task in (4, 5)]
    assert ColumnCollator(lambda given: padded(given + given))(rows)["task_ids"].tolist() == [4, 5, 4, 5]
    for row in rows:
        del row["chosen_ids"], row["rejected_ids"]
    assert ColumnCollator(lambda given: padded(given + given))(rows)["task_ids"].tolist() == [4, 5], "not guessed"


def test_a_column_that_some_rows_lack_is_explained():
    with pytest.raises(MoloraError, match="some rows have a task_ids column"):
        ColumnCollator(padded)([{"input_ids": [1], "task_ids": 1}, {"input_ids": [2]}])


def test_what_is_no_batch_of_mappings_is_left_to_the_collator():
    rows = [{"task_ids": 1}]
    assert ColumnCollator(list)(rows) == rows
    assert ColumnCollator(list)([1, 2]) == [1, 2]


@pytest.mark.parametrize(
    ("column", "values"),
    [("labels", [[-100, -100, -100, 5], [-100, 6, -100, 7]]), ("completion_mask", [[0, 0, 0, 1], [0, 1, 0, 1]])],
)
def test_the_prompt_is_what_stands_before_the_first_label(column, values):
    batch = {"input_ids": torch.ones(2, 4), "attention_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])}
    batch[column] = torch.tensor(values)
    assert prompt_of_batch(batch).int().tolist() == [[0, 1, 1, 0], [1, 0, 0, 0]]


@pytest.mark.parametrize(
    "batch", [[1], {"input_ids": torch.ones(2, 4)}, {"input_ids": torch.ones(2, 4), "labels": torch.ones(2)}]
)
def test_a_batch_without_token_labels_has_no_known_prompt(batch):
    assert prompt_of_batch(batch) is None
