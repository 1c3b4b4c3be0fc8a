"""What a trainer knows for the model card. It goes where a trainer's state goes, and with a living config."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

from datasets import Dataset

from molora.errors import MoloraError

TRAINING = "molora_training"
"""Key of the facts in a trainer's state."""

_ATTACHED = "_training_state"
"""In a config's `__dict__`: no field, so it is neither saved nor compared."""

_COUNTED = "_molora_rows"
"""In a trainer's `__dict__`: the dataset whose rows were counted, and what was found."""

_TASKS = "task_ids"
_MOST_TASKS = 1000
"""Larger ids are no places in a list of tasks, and more rows no table for a card."""

_AT_ONCE = 10_000

logger = logging.getLogger(__name__)


def note_training(trainer: Any) -> None:
    """Put what a trainer knows into its state, and that state onto the configs of the adapters it trains.

    So a card can be written wherever the model is saved, by whatever call. A fact that cannot be had is a warning: it
    is worth less than the weights that are saved next.
    """
    if not hasattr(trainer.model, "peft_config"):
        return
    state = trainer.state
    state.stateful_callbacks[TRAINING] = {"args": {}, "attributes": _facts_or_none(trainer)}
    kept = {
        "global_step": state.global_step,
        "epoch": state.epoch,
        "log_history": state.log_history,
        "stateful_callbacks": state.stateful_callbacks,
    }
    for config in trainer.model.peft_config.values():
        config.__dict__[_ATTACHED] = kept


def attached_state(config: Any) -> dict[str, Any] | None:
    """What `note_training` put onto a config; `None` if its model was not trained in this process."""
    return config.__dict__.get(_ATTACHED)


def training_in(state: Mapping[str, Any]) -> dict[str, Any]:
    """The facts in a trainer's state; empty if there are none."""
    kept = state.get("stateful_callbacks")
    entry = kept.get(TRAINING) if isinstance(kept, Mapping) else None
    found = entry.get("attributes") if isinstance(entry, Mapping) else None
    return dict(found) if isinstance(found, Mapping) else {}


def facts_of(trainer: Any) -> dict[str, Any]:
    """Plain facts about a training: who trains what, with which batches, on how many rows of which task."""
    args, paper = trainer.args, getattr(trainer, "_paper", None) or {}
    trained, parameters = trainer.model.get_nb_trainable_parameters()
    return {
        "trainer": f"TRL, {trainer._name}" if getattr(trainer, "_name", None) else "transformers",
        "paper": paper.get("id"),
        "trained": trained,
        "parameters": parameters,
        "learning_rate": args.learning_rate,
        "batch_rows": args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
        **_rows_once(trainer),
    }


def _facts_or_none(trainer: Any) -> dict[str, Any]:
    try:
        return facts_of(trainer)
    except Exception as error:  # see above
        logger.warning(
            "the model card says nothing of how it was trained: %s. The weights are not affected; write it into the "
            "card above or below molora's part.",
            str(error).strip() or type(error).__name__,
            exc_info=not isinstance(error, MoloraError | OSError | ValueError),
        )
        return {}


def _rows_once(trainer: Any) -> dict[str, Any]:
    """`rows_of` what a trainer trains on, counted once and not at every checkpoint."""
    dataset = trainer.train_dataset
    known = trainer.__dict__.get(_COUNTED)
    if known is None or known[0] is not dataset:
        known = trainer.__dict__[_COUNTED] = (dataset, rows_of(dataset))
    return dict(known[1])


def rows_of(dataset: Any) -> dict[str, Any]:
    """Rows of an epoch, and of each task by its id; what is not known, or is no list of tasks, is left out."""
    if not isinstance(dataset, Dataset):
        return {}
    facts: dict[str, Any] = {"rows": len(dataset)}
    counts: Counter[int] = Counter()
    if _TASKS in dataset.column_names:
        for rows in dataset.select_columns(_TASKS).with_format(None).iter(_AT_ONCE):
            ids = rows[_TASKS]
            if not all(type(one) is int and 0 <= one < _MOST_TASKS for one in ids):
                return facts
            counts.update(ids)
    if counts:
        facts["rows_of_tasks"] = [counts[index] for index in range(max(counts) + 1)]
    return facts


def asked_of_card(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of a card's front matter from the keywords of a trainer's `create_model_card`."""
    names = {"finetuned_from": "base_model", "dataset_tags": "datasets", "dataset_name": "datasets"}
    kept = ("license", "language", "tags", "model_name", *names)
    found = {names.get(name, name): kwargs[name] for name in kept if kwargs.get(name) is not None}
    if isinstance(found.get("datasets"), str):
        found["datasets"] = [found["datasets"]]
    return found
