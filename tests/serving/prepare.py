"""Make what is served, and what PyTorch answers with it: `python prepare.py WORK`, where molora is installed.

WORK then holds two folders, each with `adapters/` and `reference.json` (see `checks.Reference`):

- `small/`: SmolLM2, a plain LoRA and mixtures of five kinds, each trained for a few steps on examples/data. They adapt
  different linears, have different ranks and numbers of experts, and choose differently.
- `tiny/`: a random Llama whose heads can be divided between two processes, with random adapters.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from references import write_references
from tiny_model import FEED_FORWARD, LORA, make_tiny
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from molora import MoLoraConfig
from molora.base import PACKAGED, load_base, resolve_base
from molora.trainers import MoLoraSFTTrainer
from molora.writing import new_folder

DATA = Path(__file__).parents[2] / "examples" / "data"
TASKS = ("text_to_sql", "slot_extraction", "pronunciation", "sentiment")
NEW_TOKENS = 16
STEPS, BATCH, LONGEST = 4, 2, 72
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

TRAINED: dict[str, dict[str, Any]] = {
    "recommended": {"num_experts": 4, "calibration_rows": 8, "target_modules": "all-linear"},
    "adamole": {"target_modules": ATTENTION},
    "smora": {"num_experts": 24, "top_k": 4, "target_modules": FEED_FORWARD},
    "adamoe": {"r": 4, "target_modules": ["q_proj", "o_proj", "up_proj"]},
    "mola": {"r": 4, "target_modules": ["k_proj", "o_proj", "down_proj"]},
}
"""Mixtures on SmolLM2: null experts, thresholds, experts of one rank, and numbers that differ with depth. None takes
more than rank 64."""


def main(work: Path) -> None:
    torch.set_num_threads(1)
    small, tiny = work / "small", work / "tiny"
    base = resolve_base(PACKAGED)
    for name in ("lora", *TRAINED):
        train(small / "adapters" / name, name)
        print(f"trained {name}", flush=True)  # noqa: T201
    tokenizer = AutoTokenizer.from_pretrained(base)
    # More tokens than a block of vLLM's cache has, so that prefixes are cached.
    rows = [read_rows(task, "test", 1)[0]["prompt"] for task in TASKS]
    chats: list[Any] = [
        tokenizer.apply_chat_template(row, add_generation_prompt=True, return_dict=True) for row in rows
    ]
    prompts = [list(chat["input_ids"]) for chat in chats]
    write_references(small, base, prompts, NEW_TOKENS, "recommended")
    make_tiny(tiny, tokenizer)
    write_references(tiny, str(tiny / "base"), prompts, NEW_TOKENS, "recommended")


def read_rows(task: str, split: str, count: int) -> list[dict[str, Any]]:
    """Rows of examples/data, as TRL wants them."""
    with (DATA / f"{task}.{split}.jsonl").open() as lines:
        found = [json.loads(line)["messages"] for line in itertools.islice(lines, count)]
    return [{"prompt": messages[:-1], "completion": messages[-1:]} for messages in found]


def train(out: Path, name: str) -> None:
    """Train an adapter for a few steps: little, but every expert that was chosen has moved."""
    torch.manual_seed(0)
    model, tokenizer = load_base(PACKAGED, dtype="float32")
    if name == "lora":
        kind: Any = SFTTrainer
        config: Any = LoraConfig(task_type="CAUSAL_LM", **LORA)
    else:
        kind = MoLoraSFTTrainer
        config = MoLoraConfig.from_preset(name, task_type="CAUSAL_LM", **TRAINED[name])
    rows = [row for task in TASKS for row in read_rows(task, "train", STEPS * BATCH // len(TASKS))]
    with tempfile.TemporaryDirectory() as scratch, new_folder(out) as folder:
        trainer = kind(
            model=get_peft_model(model, config),
            args=SFTConfig(
                output_dir=scratch,
                max_steps=STEPS,
                per_device_train_batch_size=BATCH,
                learning_rate=5e-3,
                lr_scheduler_type="constant",
                max_length=LONGEST,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        trainer.train()
        trainer.model.save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
