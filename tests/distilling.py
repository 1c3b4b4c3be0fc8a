"""What tests of distillation share: students and teachers, a trainer of them, and the loss as its formula says."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments
from trl import SFTConfig

from molora import MoLoraConfig
from molora.data.collate import TaskCollator
from molora.trainers import DistillationSFTTrainer, DistillationTrainer

COLLATE = TaskCollator(pad_token_id=tiny.VOCABULARY[tiny.PAD])


def rows(count: int = 8, lengths=(5, 9, 7, 12), labels: bool = True, prompt: int = 2, **columns) -> Dataset:
    generator = torch.Generator().manual_seed(1)
    examples = []
    for index in range(count):
        ids = torch.randint(5, 90, (lengths[index % len(lengths)],), generator=generator).tolist()
        examples.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
        if not labels:
            del examples[-1]["labels"]
        examples[-1] |= {name: values[index % len(values)] for name, values in columns.items()}
    return Dataset.from_list(examples)


def student(base=None, seed: int = 0, **fields):
    torch.manual_seed(seed)
    options = {"r": 8, "target_modules": "all-linear", "init_lora_weights": True, **fields}
    return get_peft_model(tiny.tiny_llama() if base is None else base, LoraConfig(task_type="CAUSAL_LM", **options))


def routed(preset: str = "molora", base=None, **fields):
    torch.manual_seed(5)
    options = {"target_modules": "all-linear", "init_weights": False, "task_type": "CAUSAL_LM", **fields}
    return get_peft_model(tiny.tiny_llama() if base is None else base, MoLoraConfig.from_preset(preset, **options))


def collate_without_labels(examples):
    length = max(len(row["input_ids"]) for row in examples)
    pad = [[0] * (length - len(row["input_ids"])) for row in examples]
    ids = [row["input_ids"] + fill for row, fill in zip(examples, pad, strict=True)]
    masks = [[1] * len(row["input_ids"]) + fill for row, fill in zip(examples, pad, strict=True)]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(masks)}


def trainer_for(folder, model=None, teacher=None, train=None, kind=DistillationTrainer, options=None, **arguments):
    settings = {
        "output_dir": str(folder),
        "max_steps": 1,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        **arguments,
    }
    sft = issubclass(kind, DistillationSFTTrainer)
    return kind(
        model=student() if model is None else model,
        args=SFTConfig(bf16=False, gradient_checkpointing=False, **settings) if sft else TrainingArguments(**settings),
        train_dataset=rows() if train is None else train,
        data_collator=collate_without_labels if "labels" not in (train or rows()).column_names else COLLATE,
        teacher=routed() if teacher is None else teacher,
        distillation=options,
        **({"processing_class": tiny.tiny_tokenizer()} if sft else {}),
    )


def gradients(trainer):
    """Gradients of the trained parameters at the first optimizer step, and the loss that was logged."""
    found = {}
    optimizer_step = torch.optim.AdamW.step

    def kept(optimizer, *args, **kwargs):
        if not found:
            named = trainer.model.named_parameters()
            found.update({name: p.grad.clone() for name, p in named if p.grad is not None})
        return optimizer_step(optimizer, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", kept)
        trainer.train()
    return found, next(entry for entry in trainer.state.log_history if "loss" in entry)


def plain_loss(own, other, batch, temperature=1.0, hidden=0.0, task=0.0, layers=(1, 2)):
    """The loss of a batch as its formula says, in fp64: one token after the other."""
    own, other = copy.deepcopy(own).double(), copy.deepcopy(other).double().eval()
    labels = batch["labels"]
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "output_hidden_states": True}
    mine = own(**inputs)
    with torch.no_grad():
        theirs = other(**inputs)
    total, count = 0.0, 0
    for row in range(len(labels)):
        for place in range(labels.shape[1] - 1):
            if labels[row, place + 1] == -100:
                continue
            log_q = torch.log_softmax(mine.logits[row, place] / temperature, -1)
            p = torch.softmax(theirs.logits[row, place] / temperature, -1)
            total = total + temperature**2 * (p * (p.log() - log_q)).sum()
            total = total - task * torch.log_softmax(mine.logits[row, place], -1)[labels[row, place + 1]]
            for layer in layers:
                s, t = mine.hidden_states[layer][row, place], theirs.hidden_states[layer][row, place]
                total = total + hidden * ((s - t) ** 2).sum() / (t**2).sum() / len(layers)
            count += 1
    loss = total / count
    loss.backward()
    return loss.item(), {name: p.grad for name, p in own.named_parameters() if p.grad is not None}
