"""Teach a mixture to prefer right answers to wrong ones, with DPO on pairs made from rows with choices.

    python examples/dpo.py

One run, one seed, 16 held-out pairs a task, so that the standard errors it prints are large; of its output:

    right answer likelier    before   after
    arithmetic                0.438   0.812
    sentiment                 0.625   0.625

    held-out pairs whose right answer gained more: 0.750; mean margin 0.608 (0 before)
"""

import argparse
import random
from dataclasses import replace
from pathlib import Path

import torch
from datasets import Dataset
from rich.console import Console
from transformers import set_seed
from trl import DPOConfig

from molora import MoLoraConfig
from molora.base import load_base
from molora.data import TaskData, examples_of, read_rows
from molora.evaluation import score_table, score_tasks
from molora.trainers import MoLoraDPOTrainer
from molora.writing import check_place

parser = argparse.ArgumentParser(description="Direct preference optimisation.")
parser.add_argument("--model_name_or_path", default="smollm2-135m-instruct", help="a folder, a hub id, or this one")
parser.add_argument("--output_dir", default="runs/dpo")
parser.add_argument("--max_steps", type=int, default=16)
parser.add_argument("--rows", type=int, default=48, help="training pairs a task; a third as many are held out")
arguments = parser.parse_args()
check_place(arguments.output_dir)  # before the work, not after it
set_seed(0)

DATA = Path(__file__).parent / "data"
TASKS = ("arithmetic", "sentiment")


def pairs(task, split, rows):
    """The first rows of a file with two choices left: first the right one, then a wrong one, drawn at random."""
    draw = random.Random(f"{task}/{split}")
    examples = [e for row in read_rows(str(DATA / f"{task}.{split}.jsonl"))[:rows] for e in examples_of(row, task)]
    wrong = [draw.choice([choice for i, choice in enumerate(e.choices) if i != e.label]) for e in examples]
    return [replace(e, choices=(e.completion, other), label=0) for e, other in zip(examples, wrong, strict=True)]


def preferences(examples):
    """What TRL wants: a prompt and two answers to it, as messages."""
    answers = [[[{"role": "assistant", "content": text}] for text in e.choices] for e in examples]
    return Dataset.from_list(
        [{"prompt": e.prompt, "chosen": a[0], "rejected": a[1]} for e, a in zip(examples, answers, strict=True)]
    )


held_out = max(arguments.rows // 3, 1)
tasks = [TaskData(name, 1.0, pairs(name, "train", arguments.rows), pairs(name, "test", held_out)) for name in TASKS]

model, tokenizer = load_base(arguments.model_name_or_path, dtype="float32")
trainer = MoLoraDPOTrainer(
    model=model,
    # Given here, the adapter is turned off to compute the reference. An adapted model would get a frozen copy of its
    # adapter for that, which is right when an adapter is trained further.
    peft_config=MoLoraConfig.from_preset(
        "recommended",
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        calibration_rows=32,  # pairs that routers start from; the usual 96 would take minutes and 4 GB more
    ),
    args=DPOConfig(
        output_dir=arguments.output_dir,
        max_steps=arguments.max_steps,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=8,
        learning_rate=2.5e-4,
        warmup_steps=2,
        logging_steps=4,
        save_strategy="no",
        activation_checkpointing=False,  # rows are short, so memory is no matter and steps are faster
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
    ),
    train_dataset=preferences([e for task in tasks for e in task.train]),
    eval_dataset=preferences([e for task in tasks for e in task.eval]),
    processing_class=tokenizer,
)
# A reward is by how much an answer became more likely than before training, so at first all are 0 and none is
# right. What says something before and after: how often the right answer is the more likely one.
with trainer.model.disable_adapter():
    before = score_tasks(trainer.model, tokenizer, tasks)
trainer.train()
trainer.save_model()

measured = trainer.evaluate()
console = Console()
console.print("Held-out pairs whose right answer is the more likely one")
console.print(score_table(before, score_tasks(trainer.model, tokenizer, tasks)))
print(f"Held-out pairs whose right answer gained more: {measured['eval_rewards/accuracies']:.3f}")
print(f"Mean reward, right minus wrong: {measured['eval_rewards/margins']:.3f} (0 before)")
