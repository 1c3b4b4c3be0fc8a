"""Learn tasks one after the other: a mixture that grows by two experts a task, beside one LoRA trained on and on.

    python examples/continual.py

One run with one seed, 16 held-out rows a task; 6 minutes of processor time on a core of an AMD EPYC without AVX-512:

    grown: held-out loss  pronunciation      sentiment     arithmetic
    after pronunciation           2.801
    after sentiment               2.807          0.238
    after arithmetic              2.807          0.234          0.546
    grown forgot +0.006 of pronunciation; the mean loss at the end is 1.196.

    lora: held-out loss  pronunciation      sentiment     arithmetic
    after pronunciation          2.807
    after sentiment              3.461          0.146
    after arithmetic             3.105          0.119          0.423
    lora forgot +0.298 of pronunciation; the mean loss at the end is 1.216.

What the grown mixture has learned it keeps. It learns later tasks less well, with two experts instead of all
parameters, so that the mean at the end is hardly better after three tasks. docs/routers.md has five tasks and more
seeds.
"""

import argparse
import itertools
import json
from pathlib import Path

import torch
from datasets import Dataset
from peft import get_peft_model
from trl import SFTConfig

from molora import MoLoraConfig, calibrate_routers
from molora.base import load_base
from molora.trainers import MoLoraSFTTrainer
from molora.writing import check_place

DATA = Path(__file__).parent / "data"
TASKS = ("pronunciation", "sentiment", "arithmetic")
GROWTH = 2
EXPERTS = GROWTH * len(TASKS)
# The upper half of the layers only: less time than all of them, and the same for both.
PLACE = {"depth_range": [0.5, 1.0], "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
METHODS = {
    # One router reads a whole prompt: by token, prompts of a new task would take experts from older ones. Routers are
    # made from data and then left alone, so that old prompts find the old experts. A balancing bias would move them.
    "grown": {
        "config": MoLoraConfig.from_preset(
            "recommended",
            num_experts=GROWTH,
            shared_experts=0,  # they would change for old prompts too
            lora_alpha=64,
            router_level="sequence",
            freeze_router=True,
            balance_bias_rate=None,
            **PLACE,
        ),
        "learning_rate": 7.5e-4,
    },
    # As many parameters as the experts have in the end. Learning rates are those of docs/routers.md.
    "lora": {
        "config": MoLoraConfig.from_preset("lora", r=8 * EXPERTS, lora_alpha=16 * EXPERTS, **PLACE),
        "learning_rate": 5e-4,
    },
}


def rows_of(task: str, part: str, rows: int) -> Dataset:
    """The first rows of a task, as TRL reads them."""
    lines = (DATA / f"{task}.{part}.jsonl").read_text(encoding="utf-8").splitlines()[:rows]
    messages = [json.loads(line)["messages"] for line in lines]
    return Dataset.from_list([{"prompt": m[:-1], "completion": m[-1:]} for m in messages])


def grow(model, trainer: MoLoraSFTTrainer) -> None:
    """Make rows of the router for the newest experts from the rows they are for."""
    number = model.peft_config["default"].num_experts
    keep = ("input_ids", "attention_mask", "labels")
    batches = [{name: batch[name] for name in keep} for batch in itertools.islice(trainer.get_train_dataloader(), 12)]
    calibrate_routers(model, batches, experts=list(range(number - GROWTH, number)))


def learn(method: str, given: argparse.Namespace) -> list[list[float]]:
    """Train task after task, and return after each the held-out losses of all tasks so far."""
    torch.manual_seed(0)
    model, tokenizer = load_base(given.model_name_or_path, dtype="float32")
    model = get_peft_model(model, METHODS[method]["config"])
    losses: list[list[float]] = []
    for stage, task in enumerate(TASKS):
        if stage and method == "grown":
            # Freezes the experts that are there. It warns that new experts share the softmax: see `grow`.
            model.add_experts(GROWTH)
        trainer = MoLoraSFTTrainer(  # a new one, as parameters were replaced
            model=model,
            args=SFTConfig(
                output_dir=f"{given.output_dir}/{method}",
                max_steps=given.max_steps,
                per_device_train_batch_size=4,
                learning_rate=METHODS[method]["learning_rate"],
                logging_steps=given.max_steps,
                save_strategy="no",
                report_to="none",
                activation_checkpointing=False,  # rows are short, so memory is no matter
                use_cpu=not torch.cuda.is_available(),
                bf16=torch.cuda.is_available(),
            ),
            train_dataset=rows_of(task, "train", given.rows),
            eval_dataset={one: rows_of(one, "test", max(1, given.rows // 3)) for one in TASKS[: stage + 1]},
            processing_class=tokenizer,
        )
        if stage and method == "grown":
            grow(model, trainer)
        trainer.train()
        found = trainer.evaluate()
        losses.append([found[f"eval_{one}_loss"] for one in TASKS[: stage + 1]])
    trainer.save_model()
    return losses


def main(argv: list[str] | None = None) -> None:
    """Let both learn, and print what each kept."""
    parser = argparse.ArgumentParser(description="Tasks one after the other, in experts that are added.")
    parser.add_argument("--model_name_or_path", default="smollm2-135m-instruct")
    parser.add_argument("--output_dir", default="runs/continual")
    parser.add_argument("--max_steps", type=int, default=12, help="of each task")
    parser.add_argument("--rows", type=int, default=48, help="to train on, of each task; a third as many are held out")
    given = parser.parse_args(argv)
    check_place(given.output_dir)
    tables = {method: learn(method, given) for method in METHODS}
    for method, losses in tables.items():
        print(f"\n{method}: held-out loss" + "".join(f"{task:>15}" for task in TASKS))
        for task, row in zip(TASKS, losses, strict=True):
            print(f"{'after ' + task:{len(method) + 15}}" + "".join(f"{loss:15.3f}" for loss in row))
        forgotten = losses[-1][0] - losses[0][0]
        print(f"{method} forgot {forgotten:+.3f} of {TASKS[0]}; the mean loss at the end is "
              f"{sum(losses[-1]) / len(TASKS):.3f}.")  # fmt: skip


if __name__ == "__main__":
    main()
