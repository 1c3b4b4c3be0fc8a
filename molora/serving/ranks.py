"""How much rank a mixture takes on a server. Nothing here needs the base model."""

from __future__ import annotations

from pathlib import Path

import torch

from molora.errors import ConfigError
from molora.folders import unusable
from molora.layouts import LAYOUTS
from molora.plan import ModulePlan
from molora.serving.gate import ACTIVATIONS
from molora.serving.pack import PARTS
from molora.serving.refusals import why_not, why_not_module, why_not_place
from molora.slim.adapter import Adapter, read_adapter

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's `max_lora_rank` can be."""


def packed_rows(plan: ModulePlan, dtype: torch.dtype) -> int:
    """Rank that one module takes: its experts', and the rows that route."""
    if plan.is_constant:
        return LAYOUTS[plan.layout].sizes(plan.ranks, plan.r)[0]
    rank = sum(plan.ranks)
    behind = rank if plan.router in ACTIVATIONS else plan.num_experts + plan.spec.null_experts
    if plan.router in ACTIVATIONS and PARTS[dtype] == 1:
        behind = 0
    return rank + PARTS[dtype] * (behind + (plan.spec.selection == "adaptive_threshold"))


def served_rank(directory: str | Path, dtype: torch.dtype) -> int:
    """Rank that an adapter takes on a server, that of its widest module.

    Args:
        directory: Folder of a molora adapter.
        dtype: The precision it is served in.

    Raises:
        ConfigError: If it holds none, or one that cannot be served, with what to do instead.
    """
    adapter = read_adapter(directory)
    check_servable(str(directory), adapter)
    return max(packed_rows(adapter.plan(module), dtype) for module in adapter.modules)


def check_servable(directory: str, adapter: Adapter) -> None:
    """Refuse an adapter that servers cannot express.

    Raises:
        ConfigError: If it is one.
    """
    reason = why_not(adapter.config) or next(
        (
            why
            for module in adapter.modules
            if (why := why_not_place(module) or why_not_module(adapter.config, adapter.plan(module)))
        ),
        None,
    )
    if reason is not None:
        raise unservable(directory, reason)


def unservable(directory: str, reason: str) -> ConfigError:
    """The error for an adapter that cannot be served."""
    return unusable(directory, f"cannot be served: {reason}")


def rank_for_vllm(rank: int) -> int:
    """The smallest `max_lora_rank` with room for a rank.

    Raises:
        ConfigError: If there is none.
    """
    found = next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)
    if found is None:
        message = (
            f"takes rank {rank} on a server, and vLLM has room for {VLLM_RANKS[-1]} at most. Make it smaller, `molora "
            "prune DIR OUT --rank R`, or serve the nearest plain LoRA, `molora export DIR OUT --as lora --calibrate "
            "data.jsonl`."
        )
        raise unusable("a mixture", message)
    return found
