"""Mixtures of adapters that are already trained: plain PEFT LoRAs become experts, exactly."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model

from molora.compose.bank import diversity, select_experts
from molora.compose.lorahub import lorahub
from molora.compose.shots import read_shots, score_candidates
from molora.config import MoLoraConfig
from molora.imported import ImportedLora, config_from_adapters, read_lora, read_loras


def compose(
    base_model: Any,
    adapters: Sequence[str | Path | ImportedLora],
    preset: str = "arrow",
    adapter_name: str = "default",
    **overrides: Any,
) -> PeftModel:
    """Mix trained LoRA adapters on their base model, each of them unchanged.

    Ranks, scales and target modules may differ: a module that an adapter leaves alone is one where its expert adds
    nothing. Routers that follow from the adapters are set (Arrow's prototypes, PHATGOOSE's gates); others start as the
    preset says and are to be trained.

    Args:
        base_model: The model the adapters were trained on; it is changed in place, as by `get_peft_model`.
        adapters: Folders of PEFT LoRA adapters, or molora adapters with one expert.
        preset: The method that mixes them.
        adapter_name: Name of the mixture.
        **overrides: Any field of the config; wins over the preset.

    Raises:
        ConfigError: If an adapter cannot be an expert exactly, or does not belong to this base model.

    Example:
        >>> from molora.compose import compose
        >>> model = compose(base_model, ["loras/sums", "loras/dates"], preset="arrow")  # doctest: +SKIP
        >>> model.save_pretrained("mixture")  # doctest: +SKIP
    """
    config = config_from_adapters(MoLoraConfig, adapters, preset, overrides)
    model = get_peft_model(base_model, config, adapter_name=adapter_name)
    assert isinstance(model, PeftModel)
    return model


__all__ = [
    "ImportedLora",
    "compose",
    "config_from_adapters",
    "diversity",
    "lorahub",
    "read_lora",
    "read_loras",
    "read_shots",
    "score_candidates",
    "select_experts",
]
