"""JSON Schema of a run file, for editors."""

from __future__ import annotations

import dataclasses
from typing import Any

from molora.runfile.keys import Key, dataset_keys, top_level_keys
from molora.runfile.load import REQUIRED
from molora.runfile.values import adapter


def json_schema() -> dict[str, Any]:
    """Describe a run file as JSON Schema (draft 2020-12)."""
    properties = {name: _property(key) for name, key in top_level_keys().items()}
    entry = _object({name: _property(key) for name, key in dataset_keys().items()})
    properties["datasets"] |= {"items": entry, "minItems": 1}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "molora run file",
        **_object(properties),
    }


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    required = [name for name in properties if name in REQUIRED]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _property(key: Key) -> dict[str, Any]:
    schema = adapter(key.hint).json_schema()
    if key.help:
        schema["description"] = key.help
    if key.default is not dataclasses.MISSING:
        schema["default"] = key.default
    return schema
