"""From the datasets listed in a run file to batches: read, recognise, tokenize, mix, collate."""

from molora.data.collate import TaskCollator
from molora.data.formats import Example, examples_of
from molora.data.mixture import DatasetSpec, TaskData, load_tasks, mix
from molora.data.rows import Row, read_rows
from molora.data.tokenize import (
    IGNORED,
    TokenizedTask,
    encode,
    encode_parts,
    format_preview,
    supervised_tokens,
    tokenize_tasks,
)

__all__ = [
    "IGNORED",
    "DatasetSpec",
    "Example",
    "Row",
    "TaskCollator",
    "TaskData",
    "TokenizedTask",
    "encode",
    "encode_parts",
    "examples_of",
    "format_preview",
    "load_tasks",
    "mix",
    "read_rows",
    "supervised_tokens",
    "tokenize_tasks",
]
