"""The front matter of a model card: what the hub reads. No path of this machine gets into it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index

from molora.shown import hub_id

if TYPE_CHECKING:
    from molora.reports.data import Score

_ADAPTER_OF = "base_model:adapter:"
_ORDER = (
    *("library_name", "base_model", "base_model_relation", "pipeline_tag", "tags", "license", "license_name"),
    *("license_link", "language", "datasets", "metrics"),
)
_PIPELINES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
    "SEQ_2_SEQ_LM": "text2text-generation",
}
_OURS = "molora"
"""Marks our own results in a card, as the name of the metric's configuration."""


def pipeline_of(task_type: object) -> str | None:
    """The hub's name for what a model with a PEFT task type does."""
    return _PIPELINES.get(str(getattr(task_type, "value", task_type)))


def merged(old: Mapping[str, Any], new: Mapping[str, Any], tags: Collection[str], base: str | None) -> dict[str, Any]:
    """Front matter with what we know in it; what the author added stays.

    Args:
        old: What the card says so far.
        new: Entries that win over those; `None` for one that is not known.
        tags: Tags to add.
        base: Id of the base model on the hub; `None` takes out any path that PEFT wrote in its place.
    """
    found = {**old, **{name: value for name, value in new.items() if value is not None}}
    kept = [tag for tag in _listed(old.get("tags")) if not tag.startswith(_ADAPTER_OF)]
    names = base_models(old)
    found["base_model"] = base or (names[0] if len(names) == 1 else names)
    adapter_of = [_ADAPTER_OF + found["base_model"]] if isinstance(found["base_model"], str) else []
    found["tags"] = sorted({*kept, *(adapter_of if "lora" in tags else []), *tags})
    found["datasets"] = list(dict.fromkeys([*_listed(old.get("datasets")), *_listed(new.get("datasets"))]))
    order = [name for name in (*_ORDER, *found) if found.get(name) not in (None, [], "")]
    return {name: found[name] for name in dict.fromkeys(order)}


def base_models(front: Mapping[str, Any]) -> list[str]:
    """Base models that front matter names by their ids on the hub."""
    return [name for name in _listed(front.get("base_model")) if hub_id(name) == name]


def has_path(front: Mapping[str, Any]) -> bool:
    """Whether front matter names a folder of this machine as the base model."""
    names = [*_listed(front.get("base_model")), *(t.removeprefix(_ADAPTER_OF) for t in _adapter_tags(front))]
    return any(hub_id(name) != name for name in names)


def model_index(
    old: Sequence[Mapping[str, Any]] | None, name: str, scores: Sequence[Score], ids: Mapping[str, str], task: str
) -> list[dict[str, Any]] | None:
    """Scores as the hub keeps them, beside those that others added.

    Args:
        old: `model-index` of the card so far.
        name: What the model is called there.
        scores: Scores of the adapter.
        ids: Dataset on the hub that a task was scored on, by task.
        task: The hub's name for what the model does.
    """
    own = [one for one in scores if one.after is not None]
    results = [
        EvalResult(
            task_type=task,
            dataset_type=ids.get(one.task, re.sub(r"\W+", "-", one.task.lower()).strip("-") or "task"),
            dataset_name=one.task,
            metric_type=one.metric,
            metric_value=round(float(one.after or 0.0), 6),
            metric_name=one.metric.replace("_", " "),
            metric_config=_OURS,
            metric_args=_measured(one),
        )
        for one in own
    ]
    new = eval_results_to_model_index(name, results)[0]["results"] if results else []
    first: dict[str, Any] = dict(old[0]) if old else {"name": name}
    others = [left for result in first.get("results") or [] if (left := _without_ours(result))]
    return [{**first, "results": [*others, *new]}] if others or new else None


def _measured(score: Score) -> dict[str, Any]:
    own: dict[str, Any] = {"rows": score.rows}
    if score.before is not None:
        own["without_adapter"] = round(score.before, 6)
    if score.errors[1] is not None:
        own["stderr_at_most" if score.bound else "stderr"] = round(score.errors[1], 6)
    return own


def _without_ours(result: Mapping[str, Any]) -> dict[str, Any] | None:
    others = [metric for metric in result.get("metrics") or [] if metric.get("config") != _OURS]
    return {**result, "metrics": others} if others else None


def _adapter_tags(front: Mapping[str, Any]) -> list[str]:
    return [tag for tag in _listed(front.get("tags")) if tag.startswith(_ADAPTER_OF)]


def _listed(value: Any) -> list[str]:
    values = value if isinstance(value, list | tuple | set) else [] if value is None else [value]
    return [str(one) for one in values]
