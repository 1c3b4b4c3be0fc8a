"""A run file of two little tasks on a tiny model, for the tests of the commands."""

from __future__ import annotations

import json

import pytest
import yaml
from reports import write_base

WORDS = {"colour": ["red", "blue", "green"], "animal": ["cat", "dog", "fox"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def run_file(tmp_path, base, monkeypatch):
    """Write a run file and its data; return a function that changes keys and writes it again."""
    monkeypatch.chdir(tmp_path)
    for task, words in WORDS.items():
        for split in ("train", "test"):
            rows = [
                {
                    "messages": [
                        {"role": "user", "content": f"a {task} {index}"},
                        {"role": "assistant", "content": words[index % 3]},
                    ],
                    **({"choices": words, "label": index % 3} if task == "colour" else {}),
                }
                for index in range(6)
            ]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / f"{task}.{split}.jsonl").write_text(text)
    content = {
        "model_name_or_path": str(base),
        "preset": "adamole",
        "num_experts": 4,
        "target_modules": ["q_proj", "up_proj"],
        "datasets": [
            {"path": f"{task}.train.jsonl", "eval_path": f"{task}.test.jsonl", "task": task} for task in WORDS
        ],
        "output_dir": "out",
        "max_steps": 3,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "bf16": False,
        "eval_max_new_tokens": 4,
        "disable_tqdm": True,
    }

    def write(**changes):
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump({**content, **changes}, sort_keys=False))
        return str(path)

    return write


def give_scores(tmp_path, number=4, tasks=tuple(WORDS)):
    """Give the rows of some tasks scores."""
    for task in tasks:
        for split in ("train", "test"):
            file = tmp_path / f"{task}.{split}.jsonl"
            rows = [json.loads(line) | {"expert_scores": [0.1] * number} for line in file.read_text().splitlines()]
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
