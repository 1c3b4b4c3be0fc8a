"""Trains a tiny model in a process of its own, which may be killed while it saves. Used by `test_saving.py`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import tiny
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import TrainingArguments

from molora import MoLoraConfig
from molora.data.collate import TaskCollator
from molora.trainers import MoLoraTrainer

WRITES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


def trainer_for(folder, **arguments):
    torch.manual_seed(0)
    config = MoLoraConfig.from_preset(
        "mole", num_experts=4, target_modules=["q_proj"], init_weights=False, lora_dropout=0.1
    )
    ids = torch.randint(5, 90, (8, 6), generator=torch.Generator().manual_seed(1)).tolist()
    settings = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        **arguments,
    }
    rows = Dataset.from_list([{"input_ids": row, "labels": row} for row in ids])
    return MoLoraTrainer(
        model=get_peft_model(tiny.tiny_llama(), config),
        args=TrainingArguments(**settings),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tiny.tiny_tokenizer(),
        data_collator=TaskCollator(pad_token_id=0),
    )


def parameters(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def watch(folder, seen):
    """Call `seen` before each change that Python makes to files below a folder; never again without it."""
    root, active = os.fspath(folder), [True]

    def hook(event, args):
        if not active[0] or event not in WRITES or not isinstance(args[0], str | os.PathLike):
            return
        path, writes = os.fspath(args[0]), event != "open" or bool(args[2] & (os.O_WRONLY | os.O_RDWR))
        if writes and path.startswith(root):
            active[0] = False
            try:
                seen(event, Path(path))
            finally:
                active[0] = True

    sys.addaudithook(hook)
    return active


def run(folder, end, kill_before=None, resume=None, **arguments):
    """Train; write the parameters at the end to a file.

    Args:
        folder: Where checkpoints go.
        end: The file.
        kill_before: End of the path whose change, once three steps are trained, this process does not live to make.
        resume: `resume_from_checkpoint`.
        **arguments: Further training arguments.
    """
    torch.set_num_threads(1)
    trainer = trainer_for(folder, **arguments)

    def seen(event, path):
        if trainer.state.global_step == 3 and os.fspath(path).endswith(kill_before):
            os.kill(os.getpid(), signal.SIGKILL)

    if kill_before is not None:
        watch(folder, seen)
    trainer.train(resume_from_checkpoint=resume)
    torch.save(parameters(trainer), end)
