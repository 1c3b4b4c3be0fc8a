"""Everything PEFT and transformers offer for adapters works for mixtures, on every kind of model."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from accelerate import cpu_offload
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
)
from transformers import AutoModelForCausalLM

from molora import MergeError, MoLoraConfig, TargetModulesError, record_routing
from molora.layer import MoLoraLinear

DECODERS = {"llama": tiny.tiny_llama, "qwen2": tiny.tiny_qwen2, "gpt2": tiny.tiny_gpt2}
MODELS = {**DECODERS, "t5": tiny.tiny_t5, "bert": tiny.tiny_bert_classifier}
PRESETS = ["adamole", "mole", "molora", "static", "lora"]


def adapter(preset="adamole", **overrides):
    fields = {"target_modules": "all-linear", "init_weights": False, **overrides}
    return MoLoraConfig.from_preset(preset, **fields)


def wrap(kind="llama", preset="adamole", **overrides):
    return get_peft_model(MODELS[kind](), adapter(preset, **overrides)).eval()


def batch(kind="llama", rows=3):
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(5, 90, (rows, 6), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {**inputs, "decoder_input_ids": ids[:, :4]} if kind == "t5" else inputs


@torch.no_grad()
def logits(model, kind="llama", **inputs):
    return model(**(inputs or batch(kind))).logits


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


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_a_mixed_batch_gives_each_row_its_own_adapter(kind):
    model = wrap(kind)
    model.add_adapter("second", adapter("mole"))
    rows = {"default": logits(model, kind)[0]}
    model.set_adapter("second")
    rows["second"] = logits(model, kind)[1]
    with model.disable_adapter():
        rows["__base__"] = logits(model, kind)[2]
    got = logits(model, kind, **batch(kind), adapter_names=["default", "second", "__base__"])
    for row, name in zip(got, rows, strict=True):
        torch.testing.assert_close(row, rows[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_beam_search_in_a_mixed_batch_equals_each_adapter_alone(kind):
    model = wrap(kind)
    model.add_adapter("second", adapter("mole"))
    inputs = {name: value for name, value in batch(kind, rows=2).items() if "decoder" not in name}
    options = {"num_beams": 3, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    mixed = model.generate(**inputs, **options, adapter_names=["default", "second"])
    for row, name in enumerate(["default", "second"]):
        model.set_adapter(name)
        assert torch.equal(mixed[row], model.generate(**inputs, **options)[row]), name


def test_a_mixed_batch_with_an_unknown_adapter_names_those_there_are():
    with pytest.raises(ValueError, match=r"non-existing adapter.*nope.*has default"):
        wrap()(**batch(), adapter_names=["default", "nope", "__base__"])


@pytest.mark.parametrize("preset", ["adamole", "mole", "static"])
@pytest.mark.parametrize("kind", DECODERS)
def test_generation_with_and_without_cache_and_padding_agrees(preset, kind):
    model = wrap(kind, preset)
    ids = batch(rows=1)["input_ids"]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[:, 6:]
    assert torch.equal(model.generate(input_ids=ids, **options, use_cache=False)[:, 6:], expected)
    padded = torch.nn.functional.pad(ids, (3, 0))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (3, 0))
    assert torch.equal(model.generate(input_ids=padded, attention_mask=mask, **options)[:, 9:], expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_real_tokens(side):
    model, ids = wrap(), batch(rows=1)["input_ids"]
    pad = (3, 0) if side == "left" else (0, 3)
    padded, mask = torch.nn.functional.pad(ids, pad), torch.nn.functional.pad(torch.ones_like(ids), pad)
    real = slice(3, None) if side == "left" else slice(None, 6)
    torch.testing.assert_close(
        logits(model, input_ids=padded, attention_mask=mask)[:, real], logits(model, input_ids=ids)
    )


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_adapter_parameter_gets_a_gradient_and_no_other(kind, checkpointing, preset):
    model = wrap(kind, preset).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model(**batch(kind)).logits.sum().backward()
    for name, parameter in model.named_parameters():
        is_adapter = "molora_" in name or "modules_to_save" in name
        assert (parameter.grad is not None) == (parameter.requires_grad and is_adapter), name


@pytest.mark.parametrize("kind", MODELS)
def test_copy_and_pickle_after_a_forward(kind):
    model = wrap(kind)
    expected = logits(model, kind)
    assert torch.equal(logits(copy.deepcopy(model), kind), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), kind), expected)


@pytest.mark.parametrize("kind", DECODERS)
def test_the_lora_preset_is_pefts_lora(kind):
    shared = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    for use_rslora in (False, True):
        ours = wrap(kind, "lora", **shared, use_rslora=use_rslora)
        theirs = get_peft_model(
            DECODERS[kind](), LoraConfig(**shared, use_rslora=use_rslora, init_lora_weights=False)
        ).eval()
        parameters = dict(theirs.named_parameters())
        for name, parameter in ours.named_parameters():
            if "molora_" in name:
                parameter.data.copy_(parameters[name.replace("molora_", "lora_")].data)
        torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("preset", ["static", "lora"])
def test_a_gate_that_ignores_the_input_merges_exactly(kind, preset):
    model = wrap(kind, preset)
    expected = logits(model, kind)
    merged = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    assert not [name for name, _ in merged.named_modules() if "molora" in name]
    torch.testing.assert_close(logits(merged, kind), expected, rtol=1e-4, atol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, kind), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model, kind), expected, rtol=1e-4, atol=1e-5)


def test_safe_merge_finds_a_broken_adapter_and_leaves_the_base_alone():
    model = wrap(preset="static")
    layer = next(module for module in model.modules() if isinstance(module, MoLoraLinear))
    before = layer.base_layer.weight.clone()
    layer.molora_A["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before)


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_a_routed_mixture_refuses_to_merge_and_leaves_no_weight_changed(merge):
    model = wrap(preset="static")
    model.add_adapter("routed", adapter())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(MergeError, match="'routed' routes every token"):
        getattr(model, merge)(adapter_names=["default", "routed"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("preset", ["adamole", "static"])
def test_unloading_with_trained_tokens_restores_the_base_model(preset):
    model = wrap(preset=preset, trainable_token_indices=[0, 1], target_modules=["q_proj"])
    assert torch.equal(logits(model.unload()), logits(tiny.tiny_llama().eval()))


@pytest.mark.multiprocess
@pytest.mark.parametrize("preset", ["adamole", "static"])
def test_training_under_fsdp_with_pefts_own_wrap_policy(preset, tmp_path):
    """Which wraps every module that owns a trainable weight, so that the weight exists only during its forward."""
    worker = Path(__file__).parent / "fsdp_worker.py"
    run = subprocess.run(
        [sys.executable, str(worker), preset, str(tmp_path / "store")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-1500:]


def test_an_offloaded_model_gives_the_same_output():
    model = wrap()
    expected = logits(model)
    cpu_offload(model, execution_device="cpu")
    torch.testing.assert_close(logits(model), expected)


@pytest.mark.parametrize("copied", [lambda model: model, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_an_unloaded_model_is_told_of_no_calls(copied):
    model = copied(wrap("t5"))
    base = model.unload()
    for module in base.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks


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


@pytest.mark.parametrize("preset", ["adamole", "mole"])
def test_a_whole_model_compiles(preset):
    model = wrap(preset=preset)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(logits(compiled), logits(model), rtol=1e-4, atol=1e-5)


def test_recording_sees_every_adapted_linear_once_and_only_inside_the_block():
    model = wrap(target_modules=["q_proj", "up_proj"])
    with record_routing(model) as records:
        logits(model)
    assert sorted(record.layer.split(".")[-1] for record in records) == ["q_proj"] * 2 + ["up_proj"] * 2
    assert all(record.mask.shape == (3, 6) for record in records)
    logits(model)
    assert len(records) == 4
    with record_routing(model, with_grad_only=True) as records:
        logits(model)
    assert records == []


def test_nested_recordings_both_hear_everything_and_a_copy_is_recorded_by_nobody():
    model = wrap(target_modules=["q_proj"])
    with record_routing(model) as outer:
        with record_routing(model) as inner:
            logits(model)
        logits(model)
        logits(copy.deepcopy(model))
    assert (len(inner), len(outer)) == (2, 4)


def test_injecting_another_method_under_the_same_name_leaves_nothing_of_the_old_one():
    model = inject_adapter_in_model(adapter("adamole"), tiny.tiny_llama())
    model = inject_adapter_in_model(adapter("lora"), model)
    logits(model)
    names = [name for name, _ in model.named_parameters() if "molora_" in name]
    assert not [name for name in names if "router" in name or "threshold" in name]


def test_shapes_can_be_worked_out_on_the_meta_device():
    with torch.device("meta"):
        base = tiny.tiny_llama()
    model = get_peft_model(base, adapter(), low_cpu_mem_usage=True)
    ids = torch.zeros(2, 5, dtype=torch.long, device="meta")
    assert model(input_ids=ids).logits.shape == (2, 5, 100)


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
