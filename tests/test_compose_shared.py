"""Trained adapters in presets that have shared experts, and beside new experts: what is new, and what it follows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from loras import IDS
from methods import layers_of
from tiny import tiny_llama

from molora.compose import compose
from molora.errors import ConfigError


@pytest.mark.parametrize("preset", ["recommended", "mocle"])
def test_rank_and_alpha_of_a_presets_own_shared_experts_can_be_chosen(folders: list[Path], preset: str) -> None:
    model = compose(tiny_llama(), folders, preset=preset, r=3, lora_alpha=6)
    config = model.peft_config["default"]
    assert config.num_experts == len(folders)
    assert config.shared_experts > 0
    for layer in layers_of(model).values():
        assert layer.molora_plan["default"].ranks[len(folders) :] == (3,) * config.shared_experts
        assert layer.molora_plan["default"].scales[len(folders) :] == (2.0,) * config.shared_experts


def test_the_last_adapters_may_be_the_shared_experts_of_the_preset(folders: list[Path]) -> None:
    model = compose(tiny_llama(), folders, preset="recommended", num_experts=2, top_k=1, renormalize=False)
    said = compose(
        tiny_llama(), folders, preset="recommended", num_experts=2, top_k=1, renormalize=False, shared_experts=2
    )
    assert model.peft_config["default"].to_dict() == said.peft_config["default"].to_dict()
    weights = torch.tensor([0.3, 0.7])
    got, expected = (one.eval()(IDS, expert_weights=weights).logits for one in (model, said))
    assert torch.equal(got, expected)


def test_more_adapters_than_routed_and_shared_experts_are_refused(folders: list[Path]) -> None:
    with pytest.raises(ConfigError, match="num_experts: got 1 and 2 shared ones, but 4 adapters are given"):
        compose(tiny_llama(), folders, preset="recommended", num_experts=1)


@pytest.mark.parametrize(("preset", "number", "kept"), [("recommended", 4, 2), ("arrow", 6, 3), ("arrow", 2, 2)])
def test_a_presets_top_k_is_limited_by_all_routed_experts(
    folders: list[Path], preset: str, number: int, kept: int
) -> None:
    model = compose(tiny_llama(), folders[:1], preset=preset, num_experts=number)
    assert model.peft_config["default"].top_k == kept
