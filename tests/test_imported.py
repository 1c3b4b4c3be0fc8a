"""Trained adapters are read exactly, or refused with all reasons."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from loras import ATTENTION, edit_config, save_lora
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from tiny import tiny_llama

from molora.errors import ConfigError
from molora.imported import description_mistakes, expert_at
from molora.imported.folder import read_lora, read_loras
from molora.imported.refusals import lora_problems


def test_a_lora_is_read_as_peft_loads_it(folders: list[Path]) -> None:
    for folder, lora in zip(folders, read_loras(folders), strict=True):
        peft_model = PeftModel.from_pretrained(tiny_llama(), str(folder))
        layers = {
            name.removeprefix("base_model.model."): module
            for name, module in peft_model.named_modules()
            if "default" in getattr(module, "lora_A", {})
        }
        assert lora.name == folder.name
        assert lora.factors.keys() == layers.keys()
        for name, (a, b, scale) in lora.factors.items():
            torch.testing.assert_close(scale * b @ a, layers[name].get_delta_weight("default"))
            assert scale == layers[name].scaling["default"]
            assert expert_at(lora.description, name) == (layers[name].r["default"], scale)


def test_rank_is_zero_where_an_adapter_changes_nothing(folders: list[Path]) -> None:
    description = read_lora(folders[0]).description
    assert expert_at(description, ATTENTION.format(0, "k")) == (0, 0.0)
    assert expert_at(description, ATTENTION.format(0, "q")) == (4, 3.0)
    assert json.loads(json.dumps(description)) == description
    assert not list(description_mistakes([description]))


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        ({"r": 0}, "`r` is 0"),
        ({"r": True}, "`r` is True"),
        ({"rank_patern": {}}, "Did you mean 'rank_pattern'?"),
        ({"target_modules": "q_proj"}, "must be a list of full module names"),
        ({"target_modules": [1]}, "must be a list of full module names"),
        ({"lora_alpha": float("nan")}, "`lora_alpha` is nan"),
        ({"lora_alpha": float("inf")}, "`lora_alpha` is inf"),
        ({"lora_alpha": 10**400}, "must be a finite number"),
        ({"rank_pattern": {"q_proj": 0}}, "`rank_pattern` is {'q_proj': 0}"),
        ({"alpha_pattern": {"q_proj": "x"}}, "`alpha_pattern` is {'q_proj': 'x'}"),
        ({"alpha_pattern": {"(": 3}}, "regular expressions"),
    ],
)
def test_mistakes_in_a_description(folders: list[Path], change: dict[str, Any], fragment: str) -> None:
    description = read_lora(folders[0]).description | change
    assert any(fragment in mistake for mistake in description_mistakes([description]))


@pytest.mark.parametrize(
    ("fields", "fragment"),
    [
        ({"use_dora": True}, "use_dora: got True"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "lora_only"}, "must be 'none'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_parameters": ["w"]}, "target_parameters"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed the base weight"),
        ({"init_lora_weights": "olora"}, "changed the base weight"),
        ({"init_lora_weights": "corda"}, "changed the base weight"),
        ({"init_lora_weights": "lora_ga"}, "changed the base weight"),
        ({"init_lora_weights": "loftq"}, "changed the base weight"),
        ({"alora_invocation_tokens": [1, 2]}, "activated LoRA"),
        ({"use_of_the_future": {"a": 1}}, "does not know the field"),
        ({"scaling_of_the_future": 0.5}, "does not know the field"),
        ({"kind_of_the_future": "x"}, "does not know the field"),
        ({"r": "4"}, "r: got '4'; must be a whole number"),
        ({"r": 0}, "r: got 0"),
        ({"r": []}, "r: got []"),
        ({"lora_alpha": None}, "lora_alpha: got None"),
        ({"lora_alpha": float("nan")}, "lora_alpha: got nan; must be a finite number"),
        ({"use_rslora": "no"}, "use_rslora: got 'no'"),
        ({"rank_pattern": [1]}, "rank_pattern: got [1]"),
        ({"rank_pattern": {"(": 3}}, "rank_pattern: got {'(': 3}; must be a mapping of module names or regular"),
        ({"rank_pattern": {"a{9999999999}": 3}}, "rank_pattern: got"),
        ({"rank_pattern": {"q_proj": []}}, "rank_pattern: got {'q_proj': []}"),
        ({"alpha_pattern": "x"}, "alpha_pattern: got 'x'"),
        ({"alpha_pattern": {"q_proj": float("inf")}}, "alpha_pattern: got"),
        ({"peft_type": "LOHA"}, "got 'LOHA'"),
        ({"r": 5}, "says 5"),
    ],
)
def test_what_is_no_sum_of_b_a_is_refused(tmp_path: Path, fields: dict[str, Any], fragment: str) -> None:
    folder = save_lora(tmp_path / "lora", r=4, target_modules=["q_proj"])
    edit_config(folder, **fields)
    with pytest.raises(ConfigError) as caught:
        read_lora(folder)
    assert fragment in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("source", ["x", ["x"], [{"r": "4"}], {"a": 1}, [{"rank_pattern": {"(": 1}}]])
def test_odd_experts_of_a_molora_adapter_are_refused(tmp_path: Path, source: Any) -> None:
    folder = save_lora(tmp_path / "lora", r=4, target_modules=["q_proj"])
    edit_config(folder, peft_type="MOLORA", router="none", imported_experts=source)
    with pytest.raises(ConfigError, match=r"imported_experts: got|must be"):
        read_lora(folder)


def test_unknown_fields_that_say_nothing_are_read(tmp_path: Path) -> None:
    folder = save_lora(tmp_path / "lora", r=4, target_modules=["q_proj"])
    edit_config(folder, one=None, two=False, three="", four=[], five={}, rank_pattern=None, alpha_pattern=None)
    assert len(read_lora(folder).factors) == 2


def test_every_field_of_this_peft_is_known() -> None:
    known = LoraConfig().to_dict() | {"runtime_config": {"ephemeral_gpu_offload": False}}
    assert not list(lora_problems(known, ""))
    changed = dict.fromkeys(known, "x")
    assert not any("does not know" in problem.message for problem in lora_problems(changed, ""))


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal", "eva", "mica"])
def test_inits_that_leave_the_base_weight_alone_are_read(tmp_path: Path, init: Any) -> None:
    folder = save_lora(tmp_path / "lora", r=4, target_modules=["q_proj"])
    edit_config(folder, init_lora_weights=init, velora_config={"scale": 1.0})
    assert len(read_lora(folder).factors) == 2


@pytest.mark.parametrize(
    ("fields", "fragment"),
    [
        ({"target_modules": ["q_proj", "embed_tokens"]}, "lora_embedding_A"),
        ({"target_modules": ["q_proj"], "use_dora": True}, "lora_magnitude_vector"),
        ({"target_modules": ["q_proj"], "lora_bias": True}, "lora_B.bias"),
    ],
)
def test_tensors_that_are_no_factor_are_refused(tmp_path: Path, fields: dict[str, Any], fragment: str) -> None:
    folder = save_lora(tmp_path / "lora", model=tiny_llama(attention_bias=True), r=4, **fields)
    edit_config(folder, use_dora=False, lora_bias=False)  # as if the config did not tell
    with pytest.raises(ConfigError, match=fragment):
        read_lora(folder)


def test_factors_of_other_shapes_are_refused(tmp_path: Path) -> None:
    folder = save_lora(tmp_path / "conv", r=4, target_modules=["q_proj"])
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor[:, :, None, None] for name, tensor in load_file(path).items()}, path)
    with pytest.raises(ConfigError, match="only linear layers"):
        read_lora(folder)


def test_all_folders_are_reported_together(tmp_path: Path) -> None:
    good = save_lora(tmp_path / "good", r=4, target_modules=["q_proj"])
    dora = save_lora(tmp_path / "dora", r=4, target_modules=["q_proj"])
    edit_config(dora, use_dora=True, bias="all")
    old = save_lora(tmp_path / "old", r=4, target_modules=["q_proj"])
    (old / "adapter_model.safetensors").rename(old / "adapter_model.bin")
    with pytest.raises(ConfigError) as caught:
        read_loras([good, good, dora, old, tmp_path / "none"])
    message = str(caught.value)
    for fragment in ("use_dora", "must be 'none'", "save it again", "is no folder", "is given twice"):
        assert fragment in message
    with pytest.raises(ConfigError, match="no adapter given"):
        read_loras([])


def test_names_are_as_long_as_they_must_be(tmp_path: Path) -> None:
    one, two = (save_lora(tmp_path / task / "last", r=4, target_modules=["q_proj"]) for task in ("sums", "dates"))
    assert [lora.name for lora in read_loras([one, two])] == ["sums/last", "dates/last"]
    assert [lora.name for lora in read_loras([one, read_lora(two, "mine")])] == ["last", "mine"]
