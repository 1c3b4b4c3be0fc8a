"""How a language model is to be called, by what is on it."""

from __future__ import annotations

import inspect
from typing import Any


def last_logits_only(model: Any) -> dict[str, int]:
    """Keyword arguments by which a model computes the logits of the last position alone, if it can.

    None where the output layer is adapted: its experts, its routing and whoever watches them are to see every token.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "logits_to_keep" not in inspect.signature(base.forward).parameters:
        return {}
    output = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    return {} if hasattr(output, "molora_plan") else {"logits_to_keep": 1}


def generation_needs(model: Any) -> dict[str, bool]:
    """Keyword arguments of `generate` that the active adapters of a model need, beside what their routing reads.

    Routers that read the base model token by token leave no room for a key-value cache.
    """
    plans = [
        module.molora_plan[name]
        for module in model.modules()
        if hasattr(module, "molora_plan")
        for name in module.active_adapters
        if name in module.molora_plan
    ]
    return {"use_cache": False} if any(p.router_input == "base" and p.level == "token" for p in plans) else {}
