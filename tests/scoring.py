"""What tests of `molora eval` and of the harness share: rows of two tasks, and an adapter that scores differ by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from tiny import tiny_llama

from molora import MoLoraConfig
from molora.calibration import calibrate_routers, needs_calibration
from molora.data import TaskData, load_tasks
from molora.runfile.arguments import DatasetArguments

WORDS = ["yes", "no", "maybe so", "x", "Zq", "often!", "k1"]


def rows() -> list[dict[str, Any]]:
    """Rows of two tasks: prompts with choices of unequal length, and prompts with free answers."""
    made = []
    for index in range(12):
        choices = [WORDS[(index + step) % len(WORDS)] for step in range(2 + index % 3)]
        label = index % len(choices)
        given = {"prompt": f"q{index}", "completion": choices[label], "choices": choices, "label": label}
        made.append({"task": "pick", **given})
    return made + [{"task": "say", "prompt": "hi" * (1 + i), "completion": "ab"} for i in range(3)]


def write_rows(folder: Path, given: list[dict[str, Any]], name: str = "rows.jsonl") -> Path:
    """Rows in a file of a folder."""
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in given))
    return file


def tasks_of(file: Path) -> list[TaskData]:
    """The tasks in a file, all of whose rows are held out."""
    return [TaskData(t.name, 1.0, [], t.train) for t in load_tasks([DatasetArguments(path=str(file))], seed=0)]


def adapted(**fields: Any) -> Any:
    """A tiny model with random experts, strong enough to change its answers."""
    torch.manual_seed(3)
    options = {"num_experts": 3, "r": 4, "lora_alpha": 64, "target_modules": "all-linear", "init_weights": False}
    model = get_peft_model(tiny_llama(), MoLoraConfig(task_type="CAUSAL_LM", **options | fields)).eval()
    if needs_calibration(model):
        calibrate_routers(model, [{"input_ids": torch.randint(4, 94, (6, 9))}])
    return model
