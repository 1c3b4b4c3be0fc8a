"""A training that leaves out what only molora's trainers do says so, once; all others are quiet."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

from molora import MoLoraConfig
from molora.progress import tracked
from molora.trainers import MoLoraTrainer

IDS = torch.arange(4, 20).reshape(2, 8)
FIELDS = {
    "losses": {"preset": "mole"},
    "a balancing bias": {"preset": "mole", "routing_losses": {}, "balance_bias_rate": 0.01},
    "a schedule": {
        "preset": "mole",
        "routing_losses": {},
        "routing_schedules": {"temperature": {"start": 2.0, "end": 1.0}},
    },
    "none of it": {"preset": "mole", "routing_losses": {}},
}


def mixture(preset: str = "mole", **fields: object) -> PeftModel:
    config = MoLoraConfig.from_preset(preset, num_experts=3, r=2, target_modules=["q_proj"], **fields)
    return get_peft_model(tiny.tiny_llama(), config)


def said(model: torch.nn.Module, times: int = 2) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(times):
            model(input_ids=IDS, labels=IDS).loss.backward()
    return [str(one.message) for one in caught if "molora's trainers" in str(one.message)]


@pytest.mark.parametrize(("kind", "fields"), FIELDS.items(), ids=FIELDS)
def test_what_a_loop_of_ones_own_leaves_out_is_said_once(kind: str, fields: dict) -> None:
    found = said(mixture(**fields).train())
    names = {"losses": "routing_losses", "a balancing bias": "balance_bias_rate", "a schedule": "routing_schedules"}
    assert len(found) == (kind in names)
    assert all(names[kind] in sentence and "RoutingLossMixin" in sentence for sentence in found)


def test_only_the_adapters_that_are_trained_count() -> None:
    model = mixture()
    model.add_adapter("plain", MoLoraConfig.from_preset("mole", r=2, target_modules=["q_proj"], routing_losses={}))
    model.set_adapter("plain")
    assert said(model.train()) == []
    model.set_adapter("default")
    assert len(said(model)) == 1


def test_a_pass_of_a_frozen_adapter_is_none_and_does_not_use_up_the_warning() -> None:
    model = mixture().train()
    model.get_input_embeddings().weight.requires_grad_(True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("embed" in name)
    assert said(model) == []
    model.set_adapter("default")  # which makes it trainable
    assert len(said(model)) == 1


def test_a_deleted_adapter_is_forgotten() -> None:
    model = mixture()
    model.add_adapter("plain", MoLoraConfig.from_preset("mole", r=2, target_modules=["q_proj"], routing_losses={}))
    model.set_adapter("plain")
    model.delete_adapter("default")
    assert said(model.train()) == []


def test_a_compiled_training_stays_one_graph() -> None:
    model = mixture().train()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert compiled(input_ids=IDS, labels=IDS).loss.requires_grad


def test_a_copy_says_so_too() -> None:
    assert len(said(copy.deepcopy(mixture()).train())) == 1


@pytest.mark.parametrize("case", ["evaluation mode", "no gradients", "adapter disabled", "loaded to infer"])
def test_what_is_no_training_of_the_mixture_says_nothing(case: str, tmp_path) -> None:
    model = mixture().train()
    if case == "evaluation mode":
        assert said(model.eval()) == []
    elif case == "no gradients":
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error")
            model(input_ids=IDS)
    elif case == "adapter disabled":
        with model.disable_adapter(), warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*molora's trainers")
            model(input_ids=IDS)
        assert len(said(model)) == 1  # and it is still said when there is reason to
    else:
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny.tiny_llama().requires_grad_(True), str(tmp_path)).train()
        loaded.get_input_embeddings().weight.requires_grad_(True)
        assert said(loaded) == []


@pytest.mark.parametrize(("kind", "warned"), [(Trainer, 1), (MoLoraTrainer, 0)])
def test_trainers_with_the_mixin_follow_the_fields_and_others_are_told(kind: type, warned: int, tmp_path) -> None:
    arguments = TrainingArguments(str(tmp_path), max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True)
    rows = [{"input_ids": row, "labels": row} for row in IDS.tolist()]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kind(model=mixture(), args=arguments, train_dataset=rows).train()
    assert sum("molora's trainers" in str(one.message) for one in caught) == warned


def test_a_bar_hides_no_item_and_belongs_to_the_first_process(monkeypatch, capsys) -> None:
    monkeypatch.setattr("molora.progress.DELAY", 0.0)
    assert list(tracked([1, 2, 3], "counting", "number")) == [1, 2, 3]
    assert "counting" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    assert list(tracked([1, 2, 3], "counting", "number")) == [1, 2, 3]
    assert capsys.readouterr().err == ""


def test_what_no_user_can_change_is_not_warned_of() -> None:
    code = (
        "import warnings, molora, torch\n"
        "from peft import get_peft_model\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)\n"
        "model = LlamaForCausalLM(LlamaConfig(**sizes))\n"
        "model.base_model.is_gradient_checkpointing\n"
        "model = get_peft_model(model, molora.MoLoraConfig.from_preset('mole', target_modules=['q_proj']))\n"
        "model.eval().generate(input_ids=torch.tensor([[1, 2]]), max_new_tokens=1)\n"
    )
    found = subprocess.run([sys.executable, "-W", "default", "-c", code], capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    assert "gradient_checkpointing" not in found.stderr
