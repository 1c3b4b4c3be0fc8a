"""Adapters are saved, loaded, placed, switched and removed as PEFT and transformers do it, on every kind of model."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import tiny
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft_models import DECODERS, MODELS, PRESETS, adapter, batch, logits, wrap
from transformers import AutoModelForCausalLM

from molora import MoLoraConfig, TargetModulesError
from molora.layer import MoLoraLinear


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_saved_adapter_loads_bit_for_bit(kind, preset, tmp_path):
    model = wrap(kind, preset)
    expected = logits(model, kind)
    model.save_pretrained(tmp_path)
    for options in ({}, {"low_cpu_mem_usage": True}, {"adapter_name": "other"}):
        loaded = PeftModel.from_pretrained(MODELS[kind](), tmp_path, **options).eval()
        assert torch.equal(logits(loaded, kind), expected), options


@pytest.mark.parametrize("kind", DECODERS)
def test_a_new_process_loads_it_through_every_auto_class(kind, tmp_path):
    base, adapter_dir = tmp_path / "base", tmp_path / "adapter"
    DECODERS[kind]().save_pretrained(base)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), adapter()).eval()
    model.save_pretrained(adapter_dir)
    torch.save(logits(model), tmp_path / "expected.pt")
    script = f"""
import torch, molora
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM
ids = torch.tensor({batch()["input_ids"].tolist()})
expected = torch.load({str(tmp_path / "expected.pt")!r})
for auto in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
    with torch.no_grad():
        got = auto.from_pretrained({str(adapter_dir)!r}).eval()(input_ids=ids).logits
    assert torch.equal(got, expected), auto
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_the_checkpoint_holds_the_documented_names_and_nothing_else(tmp_path):
    from safetensors.torch import load_file

    wrap("llama", r=2, num_experts=3, target_modules=["q_proj"], layers_to_transform=[0]).save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.0.self_attn.q_proj."
    assert {name.removeprefix(prefix): list(value.shape) for name, value in state.items()} == {
        "molora_A.weight": [6, 32],
        "molora_B.weight": [32, 6],
        "molora_router.weight": [3, 32],
        "molora_threshold.weight": [1, 32],
        "molora_threshold.bias": [1],
    }
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["peft_type"], written["format_version"]) == ("MOLORA", 1)


def test_an_adapter_of_a_newer_format_is_refused(tmp_path):
    wrap().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 99}))
    with pytest.raises(ValueError, match=r"format 99.*Upgrade molora"):
        PeftConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", MODELS)
def test_a_fresh_adapter_and_a_disabled_one_are_the_base_model_bit_for_bit(kind):
    expected = logits(MODELS[kind]().eval(), kind)
    assert torch.equal(logits(wrap(kind, init_weights=True), kind), expected)
    model = wrap(kind)
    assert not torch.equal(logits(model, kind), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model, kind), expected)
    assert torch.equal(logits(model.unload(), kind), expected)


def test_several_adapters_live_on_one_model():
    model = wrap()
    alone = {"default": logits(model)}
    model.add_adapter("second", adapter("mole", r=2, target_modules=["q_proj", "up_proj"]))
    model.add_adapter("third", adapter("lora", use_rslora=True))
    for name in ("second", "third"):
        model.set_adapter(name)
        alone[name] = logits(model)
    model.set_adapter("default")
    assert torch.equal(logits(model), alone["default"])
    assert not torch.equal(alone["second"], alone["third"])
    model.delete_adapter("second")
    assert list(model.peft_config) == ["default", "third"]
    assert not [name for name, _ in model.named_parameters() if ".second." in name]
    model.set_adapter("third")
    assert torch.equal(logits(model), alone["third"])
    status = model.get_model_status()
    assert status.active_adapters == ["third"]
    assert status.peft_types == {"default": "MOLORA", "third": "MOLORA"}
    assert {layer.module_type for layer in model.get_layer_status()} == {"molora.MoLoraLinear"}


PATTERNS = {
    "list": ({"target_modules": ["q_proj", "v_proj"]}, {"q_proj", "v_proj"}, {0, 1}),
    "regular expression": ({"target_modules": r".*\.mlp\.(up|down)_proj"}, {"up_proj", "down_proj"}, {0, 1}),
    "one layer": ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, {"q_proj"}, {1}),
    "all of one layer": (
        {"target_modules": "all-linear", "layers_to_transform": 1},
        {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
        {1},
    ),
    "all of half the depth": (
        {"target_modules": "all-linear", "depth_range": [0, 0.5], "exclude_modules": r".*mlp.*"},
        {"q_proj", "k_proj", "v_proj", "o_proj"},
        {0},
    ),
    "all but some": (
        {"exclude_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
        {"gate_proj", "up_proj", "down_proj"},
        {0, 1},
    ),
    "default of the architecture": ({"target_modules": None}, {"q_proj", "v_proj"}, {0, 1}),
}


@pytest.mark.parametrize("case", PATTERNS)
def test_targets_are_those_asked_for(case):
    overrides, endings, layers = PATTERNS[case]
    names = [name for name, module in wrap(**overrides).named_modules() if isinstance(module, MoLoraLinear)]
    assert {name.split(".")[-1] for name in names} == endings
    assert {int(name.split("layers.")[1].split(".")[0]) for name in names} == layers


@pytest.mark.parametrize(
    ("targets", "hint"),
    [
        (["q_prj"], "Did you mean 'q_proj'"),
        ([], "Its linear layers end in"),
        (["q_proj", "nothing_like_it"], "Its linear layers end in"),
        (r".*\.layer\.q_proj", "regular expression"),
        (["embed_tokens"], "is a Embedding"),
    ],
)
def test_targets_that_cannot_be_adapted_name_the_closest_and_leave_the_model_alone(targets, hint):
    base = tiny.tiny_llama()
    with pytest.raises(TargetModulesError, match=hint):
        get_peft_model(base, MoLoraConfig(target_modules=targets))
    assert not [module for module in base.modules() if isinstance(module, MoLoraLinear)]


def test_rank_and_alpha_patterns():
    model = wrap(r=2, num_experts=4, lora_alpha=8, rank_pattern={"up_proj": 3}, alpha_pattern={r"layers\.1\..*": 16})
    for name, module in model.named_modules():
        if isinstance(module, MoLoraLinear):
            ranks = module.molora_ranks["default"]
            rank = 3 if name.endswith("up_proj") else 2
            assert ranks.ranks == (rank,) * 4
            assert ranks.scales == ((16 if "layers.1." in name else 8) / rank,) * 4


def test_modules_to_save_travel_with_the_adapter(tmp_path):
    model = wrap("bert", modules_to_save=["classifier"], target_modules=["query", "value"], task_type="SEQ_CLS")
    torch.nn.init.normal_(model.base_model.model.classifier.modules_to_save["default"].weight)
    expected = logits(model, "bert")
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(MODELS["bert"](), tmp_path).eval(), "bert"), expected)


def test_adapters_of_a_sixteen_bit_base_are_kept_in_fp32_unless_told_not_to():
    for autocast, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        model = get_peft_model(tiny.tiny_llama().bfloat16(), adapter(), autocast_adapter_dtype=autocast)
        assert {p.dtype for name, p in model.named_parameters() if "molora_" in name} == {dtype}
        assert logits(model).dtype == torch.bfloat16


def test_inference_mode_freezes_and_is_trainable_does_not(tmp_path):
    wrap().save_pretrained(tmp_path)
    for trainable in (False, True):
        model = PeftModel.from_pretrained(tiny.tiny_llama(), tmp_path, is_trainable=trainable)
        assert {p.requires_grad for name, p in model.named_parameters() if "molora_" in name} == {trainable}


def test_transformers_own_adapter_api(tmp_path):
    wrap().save_pretrained(tmp_path)
    expected = logits(wrap_from(tmp_path))
    model = tiny.tiny_llama()
    model.load_adapter(tmp_path, adapter_name="mine")
    assert torch.equal(logits(model.eval()), expected)
    model.disable_adapters()
    assert torch.equal(logits(model), logits(tiny.tiny_llama().eval()))
    model.enable_adapters()
    model.delete_adapter("mine")
    fresh = tiny.tiny_llama()
    fresh.add_adapter(adapter(), adapter_name="new")
    assert {p.requires_grad for name, p in fresh.named_parameters() if "molora_" in name} == {True}


def wrap_from(path):
    return PeftModel.from_pretrained(tiny.tiny_llama(), path).eval()


def test_low_rank_copies_into_a_reference_adapter_are_complete():
    """TRL fills its "ref" adapter by looking for `.default.` in parameter names."""
    model = wrap()
    model.add_adapter("ref", adapter())
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if ".default." in name:
            parameters[name.replace(".default.", ".ref.")].data.copy_(parameter.data)
    expected = logits(model)
    model.set_adapter("ref")
    assert torch.equal(logits(model), expected)


def test_injecting_another_method_under_the_same_name_leaves_nothing_of_the_old_one():
    model = inject_adapter_in_model(adapter("adamole"), tiny.tiny_llama())
    model = inject_adapter_in_model(adapter("lora"), model)
    logits(model)
    names = [name for name, _ in model.named_parameters() if "molora_" in name]
    assert not [name for name in names if "router" in name or "threshold" in name]


def test_without_molora_peft_does_not_know_the_method(tmp_path):
    """Why `import molora` must come first, and that nothing of PEFT is patched to hide it."""
    wrap().save_pretrained(tmp_path)
    script = f"from peft import PeftConfig; PeftConfig.from_pretrained({str(tmp_path)!r})"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "KeyError: 'MOLORA'" in result.stderr


def test_the_auto_class_restores_the_base_from_the_adapters_folder(tmp_path):
    tiny.tiny_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, adapter(task_type="CAUSAL_LM")).eval()
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()), logits(model))
