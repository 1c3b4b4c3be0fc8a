"""Plain PEFT LoRAs of every kind, saved as if they had been trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama

ATTENTION = "model.layers.{}.self_attn.{}_proj"
MIXED: list[dict[str, Any]] = [
    {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj"]},
    {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    {
        "r": 2,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 5, "up_proj": 1},
        "alpha_pattern": {r".*\.0\.self_attn\.v_proj": 7},
        "use_rslora": True,
    },
    {"r": 8, "lora_alpha": 8, "target_modules": "all-linear", "layers_to_transform": None},
]
"""Unequal rank, alpha, scaling, patterns and targets."""

IDS = torch.arange(4, 24).reshape(2, 10)
"""Token ids of a batch."""


def save_lora(folder: Path, seed: int = 0, model: Any = None, **fields: Any) -> Path:
    """Save a LoRA with random factors, as if it had been trained."""
    base = tiny_llama() if model is None else model
    torch.manual_seed(seed)
    peft_model = get_peft_model(base, LoraConfig(init_lora_weights=False, **fields))
    peft_model.save_pretrained(folder)
    # Random initial factors are for tests only; what trained adapters say is True.
    edit_config(folder, init_lora_weights=True)
    return folder


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
