"""Writes the model card of an adapter folder, and keeps what its author wrote."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from molora.card.front import base_models, has_path, merged, model_index, pipeline_of
from molora.card.place import (
    CARD_FILE,
    STAGING,
    is_ours,
    is_template,
    placed,
    read_card,
    version_lines,
    with_front,
    write_card,
)
from molora.card.source import Source, has_weights, read_source
from molora.card.text import card_text, datasets_on_hub, is_of_a_folder, scored_on, title_of
from molora.config import MoLoraConfig
from molora.errors import MoloraError
from molora.folders import CONFIG_FILE
from molora.reports.about import versions

TAGS = ("lora", "mixture-of-experts", "molora")

logger = logging.getLogger(__name__)


def update_card(
    folder: str | Path,
    config: MoLoraConfig | None = None,
    state: Mapping[str, Any] | None = None,
    card: str | Path | None = None,
    **given: Any,
) -> None:
    """Write the model card of an adapter, or bring it up to date.

    Whatever goes wrong is a warning: a card is worth less than the weights that it describes. While a trainer saves,
    nothing is written for its first adapter: it asks for the card when the files are where they belong.

    Args:
        folder: Folder of the adapter. Without weights in it nothing is written.
        config: The adapter's config if it is at hand, for weights that cannot be read.
        state: State of the trainer that has the adapter; default what lies in the folder.
        card: The card to change; default that of the folder.
        **given: Entries of the front matter that somebody asks for, such as `license`.
    """
    place = Path(folder)
    if place.name == STAGING:
        return
    path = place / CARD_FILE if card is None else Path(card)
    try:
        if (place / CONFIG_FILE).is_file() and has_weights(place):
            _update(place, config, state, path, given)
            if card is None:
                _repair_above(place)
    except Exception as error:  # see above: a training must not end for it
        logger.warning(
            "the model card %s was left as it is: %s. Correct it, or delete it and save again.",
            Path(*(part for part in path.parts if part != STAGING)),
            str(error).strip() or type(error).__name__,
            exc_info=not isinstance(error, MoloraError | OSError | ValueError),
        )


def _update(
    place: Path, config: MoLoraConfig | None, state: Mapping[str, Any] | None, path: Path, given: Mapping[str, Any]
) -> None:
    source = read_source(place, config, state)
    found = read_card(path)
    old = found.data.to_dict()
    # PEFT writes all tags anew, ours not among them, and then the base model is what it wrote as well.
    of_peft = is_ours(found.text) and "molora" not in (old.get("tags") or [])
    if path != place / CARD_FILE and (place / CARD_FILE).is_file():
        # PEFT wrote its own tags and base model over the author's in the copy, and only there.
        author = read_card(place / CARD_FILE).data.to_dict()
        old["tags"] = [*(old.get("tags") or []), *(author.get("tags") or [])]
        if base_models(author):
            old["base_model"], of_peft = author["base_model"], False
    if source.base and is_of_a_folder(found.text, source):
        if of_peft:
            old.pop("base_model", None)
        source = replace(source, base=None)
    front = _front(source, old, given)
    text = placed(found.text, card_text(source, front.get("license")), title_of(source))
    write_card(path, with_front(front, text))


def _front(source: Source, old: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    pipeline = old.get("pipeline_tag") or pipeline_of(source.config.task_type)
    own = {
        "library_name": "peft",
        "pipeline_tag": pipeline,
        "license": source.run.get("license"),
        "datasets": datasets_on_hub(source),
        **{name: value for name, value in given.items() if name not in ("tags", "model_name")},
    }
    wanted = given.get("tags") or []
    tags = [*TAGS, *([source.preset] if source.preset else []), *([wanted] if isinstance(wanted, str) else wanted)]
    front = merged(old, own, tags, source.base)
    name = given.get("model_name") or "-".join([source.base_shown, source.preset or "molora"])
    index = model_index(front.pop("model-index", None), name, source.scores, scored_on(source), str(pipeline))
    return {**front, **({"model-index": index} if index else {})}


def _repair_above(place: Path) -> None:
    """Correct the card that PEFT leaves in the folder above an adapter that has a name.

    PEFT writes one card for all adapters of a model where `save_pretrained` was told to save. If no adapter lies
    there, it becomes a list of those below.
    """
    above = place.absolute().parent
    path = above / CARD_FILE
    if place.name.startswith(("_", ".")) or not path.is_file():  # a folder that is not where it will be yet
        return
    try:
        found = read_card(path)
    except ValueError:  # none that PEFT or molora wrote
        return
    front = found.data.to_dict()
    ours = is_ours(found.text)
    if (above / CONFIG_FILE).is_file():
        if ours and has_path(front):
            _update(above, None, None, path, {})
        return
    of_peft = is_template(found.text) and (found.text.strip() or front.get("library_name") == "peft")
    if not ours and not of_peft:
        return
    source = read_source(place, None, None)
    names = sorted(file.parent.name for file in above.glob(f"*/{CONFIG_FILE}") if (file.parent / CARD_FILE).is_file())
    lines = ["The adapters in this folder:", "", *(f"- [{name}]({name}/{CARD_FILE})" for name in names), ""]
    shown = {name: version for name, version in versions(source.config).items() if name == "molora"}
    text = placed(found.text, "\n".join([*lines, *version_lines(shown)]), f"Adapters of {source.base_shown}")
    own = {"library_name": "peft", "pipeline_tag": pipeline_of(source.config.task_type)}
    write_card(path, with_front(merged(front, own, TAGS, source.base), text))
