"""Rows of molora's data as tasks of lm-evaluation-harness, encoded as in training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from transformers import PreTrainedTokenizerBase

from molora.data.formats import Example
from molora.data.mixture import TaskData
from molora.data.tokenize import encode_parts
from molora.errors import DataError
from molora.evaluation import token_f1

TASK_ID = "molora_task_id"
EXPERT_SCORES = "molora_expert_scores"
PROMPT_IDS = "molora_prompt_ids"
COMPLETION_IDS = "molora_completion_ids"
"""Columns of a document that the model reads and the task does not."""

_MEAN = {"aggregation": "mean", "higher_is_better": True}
_CHOICE: dict[str, Any] = {
    "output_type": "multiple_choice",
    "doc_to_text": "prompt",
    "doc_to_choice": "choices",
    "doc_to_target": "label",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc", **_MEAN}, {"metric": "acc_norm", **_MEAN}],
}
_TEXT: dict[str, Any] = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "text",
    "metric_list": [
        {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False},
        {"metric": "byte_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False},
        {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False},
    ],
}


class RowsTask(ConfigurableTask):
    """A task whose documents are given and not loaded."""

    def __init__(self, rows: Dataset, config: dict[str, Any]) -> None:
        self._rows = rows
        super().__init__(config={"test_split": "test", "num_fewshot": 0, "metadata": {"version": 1}, **config})

    def download(self, dataset_kwargs: Any = None, **kwargs: Any) -> None:
        """Take the rows."""
        self.dataset = {"test": self._rows}


def row_tasks(
    task: TaskData, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, task_id: int | None
) -> list[RowsTask]:
    """Make one task of each kind of rows that a task of molora has to score.

    Args:
        task: Its `eval` rows are taken.
        tokenizer: Encodes them.
        max_new_tokens: Longest answer.
        task_id: For routing that reads the task.

    Returns:
        One task, under the name it has in molora; if there are several kinds of rows, `name/choices`, `name/answers`
        and `name/texts`.
    """
    kinds: list[tuple[str, list[Example], Callable[..., dict[str, Any]], dict[str, Any]]] = [
        ("choices", [example for example in task.eval if example.choices], _choice_document, _CHOICE),
        ("answers", list(_asked(task.eval)), _answer_document, _answer_config(max_new_tokens)),
        ("texts", list(_texts(task.eval)), _text_document, _TEXT),
    ]
    found = [kind for kind in kinds if kind[1]]
    made = []
    for name, examples, document, config in found:
        known = {TASK_ID: task_id}
        rows = [document(e, tokenizer) | known | {EXPERT_SCORES: list(e.expert_scores)} for e in examples]
        full = task.name if len(found) == 1 else f"{task.name}/{name}"
        made.append(RowsTask(Dataset.from_list(rows), {"task": full, **config}))
    return made


def completion_ids(request: Instance) -> list[int]:
    """The ids of the choice that a request is about."""
    return list(request.doc[COMPLETION_IDS][request.idx])


def _asked(examples: Sequence[Example]) -> Iterator[Example]:
    return (example for example in examples if example.prompt is not None and not example.choices)


def _texts(examples: Sequence[Example]) -> Iterator[Example]:
    return (example for example in examples if example.prompt is None and example.completion.strip())


def _answer_config(max_new_tokens: int) -> dict[str, Any]:
    return {
        "output_type": "generate_until",
        "doc_to_text": "prompt",
        "doc_to_target": "completion",
        "target_delimiter": "",
        "process_results": _answer_scores,
        "metric_list": [{"metric": "exact_match", **_MEAN}, {"metric": "token_f1", **_MEAN}],
        # Greedy, whatever the model's own generation settings ask for; the end-of-text token always ends an answer.
        "generation_kwargs": {
            "until": [],
            "do_sample": False,
            "temperature": 0.0,
            "num_beams": 1,
            "repetition_penalty": 1.0,
            "max_gen_toks": max_new_tokens,
        },
    }


def _answer_scores(document: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """As `molora.evaluation` scores an answer: outer white space aside."""
    answer, wanted = results[0].strip(), document["completion"].strip()
    return {"exact_match": float(answer == wanted), "token_f1": token_f1(answer, wanted)}


def _choice_document(example: Example, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    if "" in example.choices:
        raise DataError(f"{example.where}: a choice is empty, and lm-evaluation-harness scores none such.")
    parts = [encode_parts(replace(example, completion=choice), tokenizer) for choice in example.choices]
    prompt = parts[0][0]
    return {
        "prompt": str(tokenizer.decode(prompt)),
        "choices": list(example.choices),
        "label": example.label,
        PROMPT_IDS: prompt,
        COMPLETION_IDS: [completion for _, completion in parts],
    }


def _answer_document(example: Example, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    prompt, _ = encode_parts(example, tokenizer)
    return {"prompt": str(tokenizer.decode(prompt)), "completion": example.completion, PROMPT_IDS: prompt}


def _text_document(example: Example, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {"text": example.completion}
