"""Every method trains with molora's trainer: interrupted and resumed it ends where it would have without a break."""

from __future__ import annotations

import methods
import pytest
import tiny
import torch
from datasets import Dataset
from methods import SETTINGS, build, inputs_of
from transformers import TrainingArguments

from molora.data import TaskCollator
from molora.trainers import MoLoraTrainer


def rows_for(model):
    """Eight rows with what the model's routing must be given."""
    given = inputs_of(model, rows=8)
    ids = methods.tokens(rows=8).tolist()
    # Every loss compares at most two kinds of rows, every router of tasks knows three.
    tasks = given["task_ids"].tolist() if "task_ids" in given else [index % 2 for index in range(8)]
    rows = [
        {"input_ids": row, "labels": [-100, *row[1:]], "task_ids": task} for row, task in zip(ids, tasks, strict=True)
    ]
    if "expert_scores" in given:
        rows = [
            {**row, "expert_scores": scores} for row, scores in zip(rows, given["expert_scores"].tolist(), strict=True)
        ]
    return Dataset.from_list(rows)


def trainer_for(preset, folder):
    model = build(preset)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        weight_decay=0.1,
        save_strategy="steps",
        save_steps=2,
        logging_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
    )
    return MoLoraTrainer(
        model=model,
        args=arguments,
        train_dataset=rows_for(model),
        processing_class=tiny.tiny_tokenizer(),
        data_collator=TaskCollator(pad_token_id=0),
    )


@pytest.mark.parametrize("preset", SETTINGS)
def test_training_resumes_as_if_it_had_not_stopped(preset, tmp_path):
    straight = trainer_for(preset, tmp_path)
    before = {name: p.detach().clone() for name, p in straight.model.named_parameters()}
    straight.train()
    resumed = trainer_for(preset, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    ends = dict(resumed.model.named_parameters())
    moved = 0
    for name, parameter in straight.model.named_parameters():
        assert torch.equal(parameter, ends[name]), name
        moved += not torch.equal(parameter, before[name])
        assert parameter.requires_grad or "molora_bias" in name or torch.equal(parameter, before[name]), name
    assert moved
