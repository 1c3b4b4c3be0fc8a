"""What tests of datasets share: an entry of a run file, messages of a row, and files of rows."""

import json
from dataclasses import dataclass

import pytest

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "yo"}


@dataclass(frozen=True)
class Spec:
    path: str
    name: str | None = None
    split: str | None = "train"
    task: str | None = None
    weight: float = 1.0
    max_samples: int | None = None
    eval_path: str | None = None
    eval_split: str | None = None
    eval_max_samples: int | None = None


@pytest.fixture
def write(tmp_path):
    def write_file(name, content):
        file = tmp_path / name
        if not isinstance(content, str):
            content = "".join(json.dumps(row) + "\n" for row in content)
        file.write_text(content, encoding="utf-8")
        return str(file)

    return write_file
