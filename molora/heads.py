"""What a language model computes beside its hidden states."""

from __future__ import annotations

import inspect
from typing import Any


def last_logits_only(model: Any) -> dict[str, int]:
    """Keyword arguments by which a model computes the logits of the last position alone, if it can."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(base.forward).parameters else {}
