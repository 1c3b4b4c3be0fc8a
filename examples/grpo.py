"""Learn from a reward that a function computes: GRPO on little stories whose answer the function works out.

    python examples/grpo.py

The model reads that somebody had 17 eggs and lost 5, and is to write 17 - 5. First it is shown the form of an answer,
with an operator drawn at random. Which operator belongs to which story only the reward tells it.

It took 3.9 minutes of one CPU core, on a machine that did other work. Over its 20 steps the mean reward went from 0.68
(steps 1 to 4) to 0.98 (steps 17 to 20), and it printed (one run, one seed; a standard error is about 0.035):

    Mean reward on 48 held-out stories, with other verbs: 0.708 before GRPO, 0.885 after

So short a training depends on its seed: three seeds of this one gained 0.16, 0.03 and 0.06, with four answers a story,
a plain LoRA 0.27, 0.03 and -0.04. Where all answers to a story become the same, nothing is left to learn from.
"""

import argparse
import operator
import random
import re

import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import set_seed
from trl import GRPOConfig, SFTConfig

from molora import MoLoraConfig
from molora.base import load_base
from molora.trainers import MoLoraGRPOTrainer, MoLoraSFTTrainer
from molora.writing import check_place

parser = argparse.ArgumentParser(description="Group relative policy optimisation with a verifiable reward.")
parser.add_argument("--model_name_or_path", default="smollm2-135m-instruct", help="a folder, a hub id, or this one")
parser.add_argument("--output_dir", default="runs/grpo")
parser.add_argument("--max_steps", type=int, default=20, help="of GRPO, after half as many of supervised training")
parser.add_argument("--rows", type=int, default=96, help="stories; half as many are held out")
arguments = parser.parse_args()
check_place(arguments.output_dir)  # before the work, not after it
set_seed(0)

OPERATORS = {"+": operator.add, "-": operator.sub}
VERBS = {"+": ("found", "bought", "won", "picked"), "-": ("lost", "ate", "sold", "broke")}
HELD_OUT = {"+": ("got",), "-": ("dropped",)}  # no story of the training has these verbs


def stories(count, verbs, draw):
    """Plain text, as a chat template would make rows three times as long. The answer is for the reward."""
    rows = []
    for _ in range(count):
        sign, had, more = draw.choice("+-"), draw.randint(11, 49), draw.randint(2, 9)
        prompt = f"Ann had {had} eggs and {draw.choice(verbs[sign])} {more}. Now:"
        rows.append({"prompt": prompt, "numbers": [had, more], "answer": OPERATORS[sign](had, more)})
    return rows


def reward(completions, numbers, answer, **columns):
    """What answers are worth: 0.2 for `a + b` or `a - b`, 0.5 if a and b are of the story, 1 if the value is right.

    What a model writes is never run as code: a pattern finds numbers and operator, and a table has the operators.

    Args:
        completions: The answers, as text.
        numbers: The two numbers of each story. This and `answer` are columns of the dataset.
        answer: The right value of each.
        columns: What else TRL hands over.
    """
    return [worth(*each) for each in zip(completions, numbers, answer, strict=True)]


def worth(text, numbers, answer):
    found = re.fullmatch(r"\s*([0-9]{1,3}) ([+-]) ([0-9]{1,3})\s*", text)
    if found is None:
        return 0.0
    a, b = int(found[1]), int(found[3])
    if OPERATORS[found[2]](a, b) == answer:
        return 1.0
    return 0.5 if [a, b] == list(numbers) else 0.2


draw = random.Random(0)
train = stories(arguments.rows, VERBS, draw)
held_out = stories(max(arguments.rows // 2, 1), HELD_OUT, draw)
shown = [
    {"prompt": row["prompt"], "completion": " {0} {2} {1}".format(*row["numbers"], draw.choice("+-"))} for row in train
]

model, tokenizer = load_base(arguments.model_name_or_path, dtype="float32")
# All experts are routed, as in the run above. Which method learns more here is chance: docs/routers.md.
config = MoLoraConfig.from_preset(
    "recommended", num_experts=8, shared_experts=0, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM"
)
model = get_peft_model(model, config)
model.print_trainable_parameters()
common = {
    "output_dir": arguments.output_dir,
    "logging_steps": 4,
    "save_strategy": "no",
    "activation_checkpointing": False,  # rows are short, so memory is no matter and steps are faster
    "use_cpu": not torch.cuda.is_available(),
    "bf16": torch.cuda.is_available(),
}
# A model that never earns a reward learns nothing. This training also starts the routers from data, which GRPO cannot
# do: it has no answers before it begins.
steps = max(arguments.max_steps // 2, 1)
form = SFTConfig(max_steps=steps, per_device_train_batch_size=8, learning_rate=5e-4, **common)
MoLoraSFTTrainer(model, form, train_dataset=Dataset.from_list(shown), processing_class=tokenizer).train()


def sampled():
    """An answer to each held-out story, sampled as in training, and the mean reward."""
    set_seed(0)  # so that both times the same draws decide
    inputs = tokenizer([row["prompt"] for row in held_out], return_tensors="pt", padding=True, padding_side="left")
    ids = model.eval().generate(**inputs.to(model.device), max_new_tokens=9, do_sample=True, top_k=0)
    texts = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    rewards = reward(texts, *([row[name] for row in held_out] for name in ("numbers", "answer")))
    return texts, sum(rewards) / len(rewards)


texts_before, before = sampled()
trainer = MoLoraGRPOTrainer(
    model=model,
    args=GRPOConfig(
        max_steps=arguments.max_steps,
        per_device_train_batch_size=16,
        num_generations=4,
        max_completion_length=9,
        learning_rate=2.5e-4,  # a high one soon makes all answers to a story the same, and leaves nothing to compare
        warmup_steps=2,
        **common,
    ),
    train_dataset=Dataset.from_list(train),
    reward_funcs=reward,
    processing_class=tokenizer,
)
trainer.train()
trainer.save_model()

texts_after, after = sampled()
for row, old, new in zip(held_out[:4], texts_before, texts_after, strict=False):
    print(f"{row['prompt']}{old}  became {new}")
print(
    f"Mean reward on {len(held_out)} held-out stories, with other verbs: {before:.3f} before GRPO, {after:.3f} after"
)
