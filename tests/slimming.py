"""What tests of slimming share: adapters as data, and models made of them again."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from methods import base_model, inputs_of
from methods import build as build_all
from peft import PeftModel

from molora.slim import Adapter, read_adapter, write_adapter

TARGETS = ["q_proj", "v_proj", "down_proj"]
"""Two siblings and another size of input: enough to tell modules apart."""

CLOSE: dict[str, float] = {"rtol": 1e-5, "atol": 1e-5}
EXACT: dict[str, float] = {"rtol": 1e-9, "atol": 1e-10}
"""Equal to rounding in fp32, and in fp64."""


def build(preset: str, **overrides: Any) -> Any:
    """As `methods.build`, on fewer linears where the method allows it."""
    if preset not in ("perft", "becotta", "mixlora", "mixlora-dynamic"):
        overrides.setdefault("target_modules", TARGETS)
    return build_all(preset, **overrides)


def few_tokens(number: int = 3) -> torch.Tensor:
    """Token ids of one short row: fewer tokens than experts leave some expert without one."""
    return torch.randint(5, 90, (1, number), generator=torch.Generator().manual_seed(11))


def batch_of(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """A batch as calibration gets it."""
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    return {**batch, **inputs_of(model, rows=len(ids))}


def saved(model: Any, folder: Path) -> Adapter:
    """The adapter of a model, read from its folder."""
    model.save_pretrained(folder)
    return read_adapter(folder)


def reloaded(adapter: Adapter, preset: str, folder: Path, **options: Any) -> Any:
    """A fresh base model with an adapter that went through a folder; PEFT has nothing to complain about.

    It is in the adapter's own precision, fp32 or fp64.
    """
    folder.mkdir()
    write_adapter(adapter, folder)
    exact = any(value.dtype == torch.float64 for value in adapter.tensors.values())
    base = base_model(preset).double() if exact else base_model(preset)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        return PeftModel.from_pretrained(base, folder, **options).eval()


@torch.no_grad()
def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits, with what the routing reads."""
    logits: torch.Tensor = model(input_ids=ids, **inputs_of(model, rows=len(ids))).logits
    return logits
