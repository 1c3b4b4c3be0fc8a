"""Train the recommended mixture on three tasks at once; see what each task gained and how the router treats it.

    python examples/sft.py

The router is not told which task a row is of: it starts from clusters of the training rows, found without labels.
One run, one seed, 12 held-out rows a task, so that the standard errors it prints are large; from its tables:

    task             metric       before   after        max load   distance
    sentiment        accuracy      0.583   0.583           0.349      0.217
    arithmetic       accuracy      0.083   0.667           0.347      0.286
    slot_extraction  token_f1      0.103   0.464           0.305      0.273

Twenty steps teach no sentiment but how to answer: the perplexity of its answers falls from 61 to 1.4. Tasks use the
experts differently (`distance` is 0 where a task is routed as all tasks are), and none takes over (an even load is
0.167, of the six experts that tokens choose from).
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from peft import get_peft_model
from rich.console import Console
from transformers import set_seed
from trl import SFTConfig

from molora import MoLoraConfig
from molora.base import load_base
from molora.data import TaskCollator, TaskData, examples_of, read_rows, tokenize_tasks
from molora.evaluation import score_table, score_tasks
from molora.report import routing_by_task, routing_table
from molora.trainers import MoLoraSFTTrainer
from molora.writing import check_place

parser = argparse.ArgumentParser(description="Supervised fine-tuning on several tasks.")
parser.add_argument("--model_name_or_path", default="smollm2-135m-instruct", help="a folder, a hub id, or this one")
parser.add_argument("--output_dir", default="runs/sft")
parser.add_argument("--max_steps", type=int, default=20)
parser.add_argument("--rows", type=int, default=48, help="training rows a task; a quarter as many are scored")
arguments = parser.parse_args()
check_place(arguments.output_dir)  # before the work, not after it
set_seed(0)

DATA = Path(__file__).parent / "data"


def read(task, split, rows):
    """The first rows of a file as prompts and answers."""
    return [e for row in read_rows(str(DATA / f"{task}.{split}.jsonl"))[:rows] for e in examples_of(row, task)]


tasks = [
    TaskData(name, 1.0, read(name, "train", arguments.rows), read(name, "test", max(arguments.rows // 4, 1)))
    for name in ("sentiment", "arithmetic", "slot_extraction")
]
# With `prompt` and `completion` TRL computes the loss of the answers only. It shuffles, which mixes the tasks.
rows = [
    {"prompt": e.prompt, "completion": [{"role": "assistant", "content": e.completion}]}
    for task in tasks
    for e in task.train
]

model, tokenizer = load_base(arguments.model_name_or_path, dtype="float32")
config = MoLoraConfig.from_preset(
    "recommended",
    target_modules="all-linear",
    task_type="CAUSAL_LM",
    calibration_rows=32,  # rows that routers start from; the usual 96 would take a minute and 2 GB more
)
model = get_peft_model(model, config)
model.print_trainable_parameters()

trainer = MoLoraSFTTrainer(
    model=model,
    args=SFTConfig(
        output_dir=arguments.output_dir,
        max_steps=arguments.max_steps,
        per_device_train_batch_size=8,
        learning_rate=7.5e-4,
        warmup_steps=4,
        logging_steps=4,
        save_strategy="no",
        activation_checkpointing=False,  # rows are short, so memory is no matter and steps are faster
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
    ),
    train_dataset=Dataset.from_list(rows),
    processing_class=tokenizer,
)
with model.disable_adapter():
    before = score_tasks(model, tokenizer, tasks, max_new_tokens=40)
trainer.train()
trainer.save_model()

console = Console()
console.print("Scores on held-out rows")
console.print(score_table(before, score_tasks(model, tokenizer, tasks, max_new_tokens=40)))
# `distance` is how far a task's use of the experts is from that of all tasks: 0 the same, 1 no expert shared.
held_out = tokenize_tasks(tasks, tokenizer, None, split="eval")
console.print("How each task is routed, averaged over linears")
console.print(routing_table(routing_by_task(model, held_out, TaskCollator(tokenizer.pad_token_id))))
