"""An adapted model of every kind does all that PEFT and transformers offer: it generates, trains, merges, compiles."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from peft_models import DECODERS, MODELS, PRESETS, adapter, batch, logits, wrap

from molora import MergeError, record_routing
from molora.layer import MoLoraLinear


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


def test_shapes_can_be_worked_out_on_the_meta_device():
    with torch.device("meta"):
        base = tiny.tiny_llama()
    model = get_peft_model(base, adapter(), low_cpu_mem_usage=True)
    ids = torch.zeros(2, 5, dtype=torch.long, device="meta")
    assert model(input_ids=ids).logits.shape == (2, 5, 100)
