"""What tests of reports share: a report with something in every section, and adapters as training leaves them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import yaml
from methods import build
from tiny import tiny_llama, tiny_tokenizer

from molora.reports.data import (
    Account,
    Affinity,
    Cosines,
    Curve,
    Histogram,
    Loads,
    Report,
    Score,
    TokenRouting,
    Usage,
)

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>&\"'`"
"""Text that a page must show and not obey."""

MODULES = [f"model.layers.{layer}.{kind}" for layer in range(12) for kind in ("mlp.up_proj", "self_attn.q_proj")]
STEPS = [5, 10, 15]


def example(text: str = "task", experts: int = 4, **changes: Any) -> Report:
    """A report with something in every section.

    Args:
        text: Stands wherever text comes from data.
        experts: E.
        **changes: Fields to replace.
    """
    even = [1 / experts] * experts
    uneven = [0.7, *([0.3 / (experts - 2)] * (experts - 2)), 0.0]
    identity = [[float(row == column) for column in range(experts)] for row in range(experts)]
    number = len(MODULES)
    at_a_step = [even, uneven] * (number // 2)
    used = [0.0, 0.25, 0.75, *([0.0] * (experts - 2))]
    names = [[str(index) for index in range(experts)]] * number
    alike, empty = [(MODULES[0], "0", "1", 0.95)], [(MODULES[1], "2")]
    report = Report(
        text,
        {"base model": text, "method": "molora"},
        "y = W₀x + Σₑ wₑ(x) · sₑ Bₑ Aₑ x",
        [Score(text, "accuracy", 50, 0.4, 0.8, (0.07, 0.057)), Score("other", "perplexity", 9, 12.0, 8.0)],
        [
            Curve("loss", False, {"train": [(5, 2.0), (10, 1.5), (15, 1.2)], "held-out": [(15, 1.4)]}),
            Curve("experts per token", True, {"train": [(5, 2.0), (10, 2.0)]}),
        ],
        Loads(MODULES, [experts] * number, at_a_step, text, STEPS, [at_a_step] * 3),
        Usage(123, used, 1.75, dict.fromkeys(MODULES, 1.75), Histogram([0.5, 0.5], 0.25, 0.1)),
        Affinity([text, "other"], [60, 63], MODULES, [[even, uneven]] * number, [0.1, *([0.3] * (number - 1))]),
        Cosines(MODULES, names, [identity] * number, identity, alike, empty),
        TokenRouting(text, ["Hello", " wor", "ld\n", text], ["all linears", "layer 0"], [[uneven] * 4, [even] * 4], 7),
        Account({"experts, A": 100, "routers": 20}, {"bank of experts": 400, "all": 480}, 1000, {"rank in fp32": "9"}),
        (f"key: {text}", True),
        json.dumps({"key": text}),
        {"molora": "0"},
        [text],
    )
    return dataclasses.replace(report, **changes)


def write_base(folder: Path) -> Path:
    """A tiny base model with its tokenizer."""
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_rows(path: Path, tasks: tuple[str, ...] = ("maths", "words"), rows: int = 5, **columns: Any) -> Path:
    """Rows of several tasks in one file."""
    lines = [
        {"prompt": f"{task} {at} ", "completion": task[at % 5], "task": task, **columns}
        for task in tasks
        for at in range(rows)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_adapter(
    folder: Path, base: Path, preset: str = "molora", tasks: tuple[str, ...] = (), **fields: Any
) -> Path:
    """An adapter in its folder, with the names of its tasks if there are some."""
    model = build(preset, **fields)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder)
    if tasks:
        report = {"tasks": list(tasks), "before": [], "after": [], "routing": []}
        (folder / "molora_report.json").write_text(json.dumps(report))
    return folder


def write_run_file(path: Path, base: Path, rows: Path, out: Path, **changes: Any) -> Path:
    """A run file for a training of a few steps on rows of several tasks."""
    content = {
        **{"model_name_or_path": str(base), "preset": "adamole", "num_experts": 4, "r": 2},
        **{"target_modules": ["q_proj", "up_proj"], "output_dir": str(out), "max_steps": 4, "learning_rate": 0.01},
        "datasets": [{"path": str(rows), "eval_path": str(rows), "task": task} for task in ("maths", "words")],
        **{"logging_steps": 1, "save_strategy": "steps", "save_steps": 2, "bf16": False, "eval_max_new_tokens": 2},
        **{"disable_tqdm": True, **changes},
    }
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path
