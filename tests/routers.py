"""Small adapters whose routers are trained, and a trainer of them."""

from __future__ import annotations

import kinds
import tiny
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import TrainingArguments

from molora import MoLoraConfig
from molora.data.collate import TaskCollator
from molora.trainers import MoLoraTrainer


def adapted(preset: str = "adamole", **overrides):
    torch.manual_seed(0)
    fields = {"num_experts": 4, "target_modules": ["q_proj", "down_proj"], "init_weights": False, **overrides}
    return get_peft_model(tiny.tiny_llama(), MoLoraConfig.from_preset(preset, **fields))


def trainer_for(folder, model, train=None, trainer_class=MoLoraTrainer, optimizers=(None, None), **arguments):
    settings = {**kinds.COMMON, "output_dir": str(folder), "lr_scheduler_type": "constant", **arguments}
    return trainer_class(
        model=model,
        args=TrainingArguments(**settings),
        train_dataset=Dataset.from_list(kinds.causal(12)) if train is None else train,
        data_collator=TaskCollator(pad_token_id=tiny.VOCABULARY[tiny.PAD]),
        optimizers=optimizers,
    )


def values(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items() if "molora_" in name}


def assert_same(one, other):
    assert one.keys() == other.keys() != set()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
