"""What tests of the quality bench share: two small tasks, their rows, and a mixture to train on them.

Import it before `benchmarks`, which it makes importable. A file of tests names the fixture that it uses:
`task_folder = quality.task_folder`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tiny import tiny_tokenizer

sys.path.append(str(Path(__file__).parent.parent))  # `benchmarks` is a folder of the repository, not of the package

from benchmarks.quality import data, training

WORDS = {"up": ["rise", "grow", "climb"], "down": ["fall", "sink", "drop"]}
MIXTURE = {"r": 2, "num_experts": 4, "lora_alpha": 4, "selection": "top_k", "top_k": 2, "target_modules": "all-linear"}
PLACE = training.Place("cpu", "float32", 0)


def write_tasks(folder: Path, rows: int = 30) -> Path:
    """Two tasks: one with choices, one without; rows differ by a number."""
    for side, count in (("train", rows), ("test", 8)):
        (folder / side).mkdir(parents=True)
        lines: dict[str, list[str]] = {"way": [], "copy": []}
        for number in range(count):
            label = number % 2
            way = list(WORDS)[label]
            for task, asked, answer, choices in (
                ("way", f"{side} {WORDS[way][number % 3]} {number}?", way, list(WORDS)),
                ("copy", f"{side} {number * 7}", str(number * 7), []),
            ):
                messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
                row = {"task": task, "id": f"{task}/{number}", "messages": messages, "choices": choices}
                row |= {"metric": "choice_norm" if choices else "exact", "label": label if choices else -1}
                lines[task].append(json.dumps(row))
        for task, own in lines.items():
            (folder / side / f"{task}.jsonl").write_text("\n".join(own) + "\n")
    return folder


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def rows_of(folder: Path, **changed) -> data.TaskRows:
    given = {"per_task": 16, "max_length": 128, "validation": 5, "test_rows": 6}
    return data.load_rows(folder, ["copy", "way"], tiny_tokenizer(), **(given | changed))
