"""Chat templates: a server has one for all its models, while every adapter may have been trained with its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

TEMPLATE_FILE = "chat_template.jinja"
REMEDY = "To choose one: `-- --chat-template FILE`; to have each its own, start a server for each."


def read_template(model: str) -> str | None:
    """The chat template of a model, or beside an adapter.

    Args:
        model: A folder, or a name on the hub.
    """
    text = _read(model, TEMPLATE_FILE)
    if text is not None:
        return text
    try:
        config: Any = json.loads(_read(model, "tokenizer_config.json") or "{}")
    except ValueError:
        return None
    found = config.get("chat_template") if isinstance(config, dict) else None
    if isinstance(found, list):  # several, by name
        found = next((entry.get("template") for entry in found if entry.get("name") == "default"), None)
    return found if isinstance(found, str) else None


def choose_template(base: str | None, adapters: Mapping[str, str | None]) -> tuple[str | None, str | None]:
    """Choose the chat template of a server.

    The base model's is kept where it has one, unless all adapters agree on another.

    Args:
        base: That of the base model.
        adapters: Those of the adapters by name.

    Returns:
        The name of the adapter whose template is to be used, `None` for the base model's own, and what to tell the
        user, if anything.
    """
    own = {name: text.strip() for name, text in adapters.items() if text is not None}
    others = [name for name, text in own.items() if base is None or text != base.strip()]
    if not others:
        return None, None
    agree = len(set(own.values())) == 1
    if agree and (base is None or len(own) == len(adapters)):
        why = "the base model has none" if base is None else "it is that of all adapters, and not the base model's"
        return others[0], f"The chat template is that of {others[0]}, for all models: {why}. {REMEDY}"
    listed = ", ".join(others)
    if base is None:
        return None, f"{listed} come with different chat templates, and the base model has none. {REMEDY}"
    return None, f"All models get the base model's chat template, and {listed} had another in training. {REMEDY}"


def _read(model: str, name: str) -> str | None:
    if Path(model).is_dir():
        path: str | None = str(Path(model) / name)
    else:
        path = cached_file(
            model,
            name,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    if path is None or not Path(path).is_file():
        return None
    return Path(path).read_text(encoding="utf-8")
