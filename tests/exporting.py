"""What tests of exports share: a base model, rows of two tasks, adapters as if trained, and the logits of each."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import methods
import pytest
import tiny
import torch
from methods import tokens
from peft import PeftModel
from transformers import AutoModelForCausalLM

WORDS = {"colour": ["red", "blue", "green"], "animal": ["cat", "dog", "fox"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny.tiny_llama().save_pretrained(folder)
    tiny.tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [
        {
            "task": task,
            "messages": [
                {"role": "user", "content": f"a {task} {index}"},
                {"role": "assistant", "content": words[index % 3]},
            ],
            **({"choices": words, "label": index % 3} if task == "colour" else {}),
        }
        for index in range(24)
        for task, words in WORDS.items()
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """Make the folder of an adapter of a preset, with random weights as if it had been trained."""

    @functools.cache
    def make(preset: str, **overrides) -> Path:
        folder = tmp_path_factory.mktemp(preset)
        lists = {name: list(value) if isinstance(value, tuple) else value for name, value in overrides.items()}
        model = methods.build(preset, **lists)
        model.peft_config["default"].base_model_name_or_path = str(base)
        model.save_pretrained(folder)
        return folder

    return make


def logits_of(base: Path, adapter: Path | None = None, **inputs) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        return model(input_ids=tokens(), **inputs).logits
