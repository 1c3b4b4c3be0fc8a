"""Adapters on quantised linears: each library that runs on a CPU, and what every one of them must bear.

gptqmodel asks for a newer torch than molora is tested with, so its layers are only tested where it is installed.
"""

from __future__ import annotations

import copy
import importlib.util

import methods
import pytest
import tiny
import torch
from methods import SETTINGS, build, inputs_of, tokens
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, prepare_model_for_kbit_training
from peft import set_peft_model_state_dict as set_state
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from molora import MoLoraConfig
from molora.errors import MergeError, TargetModulesError
from molora.layer import MoLoraLinear
from molora.quantization import QuantizationError, keep_packing, restore_routing, routing_values

for _library in ("bitsandbytes", "torchao", "hqq"):
    pytest.importorskip(_library, reason="`make test-quantization` installs it")

from bitsandbytes.functional import _convert_weight_packed_for_cpu  # noqa: E402
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear  # noqa: E402
from torchao.quantization import (  # noqa: E402
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    quantize_,
)

needs_gptqmodel = pytest.mark.skipif(
    importlib.util.find_spec("gptqmodel") is None,
    reason="gptqmodel needs another torch: pip install gptqmodel optimum",
)


def bnb(**fields):
    return lambda: BitsAndBytesConfig(bnb_4bit_compute_dtype="float32", **fields)


def torchao(kind, **fields):
    return lambda: TorchAoConfig(kind(**fields))


INT4 = {"weight_dtype": torch.int4, "granularity": PerGroup(32)}
LOADED = {
    "bnb-nf4": bnb(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "bnb-nf4-nested": bnb(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "bnb-fp4": bnb(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "bnb-fp4-in-float32": bnb(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_quant_storage="float32"),
    "bnb-int8": bnb(load_in_8bit=True),
    "torchao-int8": torchao(Int8WeightOnlyConfig),
    "torchao-int8-dynamic": torchao(Int8DynamicActivationInt8WeightConfig),
    "torchao-int4": torchao(IntxWeightOnlyConfig, **INT4),
}
"""What transformers quantises while it loads a model."""

ERROR = {"torchao-int8": 0.01, "torchao-int8-dynamic": 0.01, "bnb-int8": 0.02}
"""Largest error of quantising normal weights, relative to them; 0.15 for 4 bits."""


def gptq(linear):
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    return _filled(TorchLinear, linear)


def awq(linear):
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    return _filled(AwqTorchLinear, linear)


def _filled(kind, linear):
    """A layer of gptqmodel with drawn contents, as quantising would need examples."""
    sizes = {"in_features": linear.in_features, "out_features": linear.out_features}
    layer = kind(bits=4, group_size=32, sym=True, desc_act=False, bias=False, register_buffers=True, **sizes)
    for name, buffer in layer.named_buffers():
        if name in ("qweight", "qzeros"):
            buffer.copy_(torch.randint(-(2**31), 2**31 - 1, buffer.shape, dtype=torch.int32))
        elif name == "scales":
            buffer.fill_(0.01)
    layer.post_init()
    return layer


def hqq(linear):
    config = BaseQuantizeConfig(nbits=4, group_size=32)
    return HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu")


REPLACED = {"hqq": hqq, "gptq": gptq, "awq": awq}
"""What stands in the place of a linear."""

IN_PLACE = {"torchao-in-python": lambda model: quantize_(model.model, Int8WeightOnlyConfig())}
UNMERGEABLE = ["torchao-in-python", *(pytest.param(name, marks=needs_gptqmodel) for name in ("gptq", "awq"))]
MERGEABLE = [*LOADED, "hqq"]
ALL = [*MERGEABLE, *UNMERGEABLE]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    plain().save_pretrained(path)
    return path


def plain():
    # One layer is quick; every library's groups divide these sizes. bitsandbytes reads scales wrongly on CPUs with
    # AVX512 where a row is no multiple of the 64 weights that share one.
    return tiny.tiny_llama(num_hidden_layers=1, num_key_value_heads=4, hidden_size=64, intermediate_size=128)


def quantised(name, folder):
    """The same tiny model each time, quantised by a library."""
    if name in LOADED:
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=LOADED[name]()).eval()
        keep_packing(model)  # a base that runs before it has an adapter
        return model
    model = plain()
    if name in IN_PLACE:
        IN_PLACE[name](model)
        return model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for key, module in list(model.model.named_modules()):
            if isinstance(module, nn.Linear):
                model.model.set_submodule(key, REPLACED[name](module))
    return model.requires_grad_(False)


def config_for(preset="adamole", **fields):
    fields = {"num_experts": 4, "r": 2, "target_modules": "all-linear", "init_weights": False, **fields}
    return MoLoraConfig.from_preset(preset, task_type="CAUSAL_LM", **fields)


def adapted(name, folder, preset="adamole", **fields):
    torch.manual_seed(2)
    return get_peft_model(quantised(name, folder), config_for(preset, **fields)).eval()


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, MoLoraLinear)]


def logits(model):
    with torch.no_grad():
        return model(tokens()).logits


@pytest.mark.parametrize("name", ALL)
def test_all_linear_finds_every_quantised_linear_and_not_the_head(name, folder):
    model = adapted(name, folder)
    layers = layers_of(model)
    assert len(layers) == 7
    assert all(layer.quantization_backend is not None for layer in layers)
    assert "quantization_backend=" in repr(layers[0])
    assert "lm_head" not in model.peft_config["default"].target_modules


@pytest.mark.parametrize("name", ALL)
def test_an_adapter_adds_to_a_quantised_linear_what_it_adds_to_a_plain_one(name, folder):
    model, twin = adapted(name, folder), get_peft_model(plain(), config_for()).eval()
    set_state(twin, get_peft_model_state_dict(model))
    for layer, other in zip(layers_of(model), layers_of(twin), strict=True):
        x = torch.randn(2, 5, layer.in_features)
        with torch.no_grad():
            added, expected = layer(x) - layer.base_layer(x), other(x) - other.base_layer(x)
        assert expected.abs().max() > 0.01
        torch.testing.assert_close(added, expected, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_training_lowers_the_loss_through_every_adapter_weight_and_leaves_the_base_alone(name, folder):
    model, ids = adapted(name, folder).train(), tokens()
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert {"molora_A", "molora_B", "molora_router", "molora_threshold"} == {key.split(".")[-3] for key in trained}
    optimizer, losses = torch.optim.AdamW(trained.values(), lr=3e-3), []
    for _ in range(6):
        loss = model(ids, labels=ids).loss
        loss.backward()
        assert all(p.grad.abs().sum() > 0 for p in trained.values())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    with model.disable_adapter():
        assert torch.equal(logits(model.eval()), logits(quantised(name, folder)))


@pytest.mark.parametrize("name", ALL)
def test_a_saved_adapter_gives_the_same_output_on_a_base_quantised_again(name, folder, tmp_path):
    model = adapted(name, folder)
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(quantised(name, folder), tmp_path).eval()
    assert torch.equal(logits(reloaded), logits(model))
    assert not torch.equal(logits(model), logits(quantised(name, folder)))


@pytest.mark.parametrize("name", ALL)
def test_checkpointing_gives_the_same_gradients(name, folder):
    gradients, ids = [], tokens()
    for checkpointing in (False, True):
        model = adapted(name, folder).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(ids, labels=ids).loss.backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.requires_grad})
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, msg=key)


BNB_4BIT = [name for name in LOADED if name.startswith("bnb") and name != "bnb-int8"]


@pytest.fixture
def packed_in_evaluation(monkeypatch):
    """What bitsandbytes finds on CPUs with AVX512-BF16, on any CPU; only running what it packed needs one."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)


@pytest.mark.parametrize("name", BNB_4BIT)
def test_evaluation_leaves_gradients_and_base_weights_as_they_were(name, folder, packed_in_evaluation):
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=LOADED[name]())
    # Gradients of q and v pass through the linears without an adapter, too.
    model, ids = get_peft_model(base, config_for(target_modules=["q_proj", "v_proj"])), tokens()
    weights, gradients = [], []
    for _ in range(2):
        weights.append([layer.get_base_weight().clone() for layer in layers_of(model)])
        model.zero_grad()
        model.train()(ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        logits(model.eval())
    for before, after in (*zip(*weights, strict=True), *zip(*gradients, strict=True)):
        assert torch.equal(before, after)


def test_weights_that_were_packed_before_the_adapter_came_are_refused(folder, packed_in_evaluation):
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=LOADED["bnb-nf4"]())
    linear = base.model.layers[0].mlp.up_proj
    linear.weight.data, linear.weight.quant_state = _convert_weight_packed_for_cpu(
        linear.weight.data, linear.weight.quant_state
    )
    with pytest.raises(QuantizationError, match=r"weights of 'model.layers.0.mlp.up_proj' were packed .* Load the"):
        get_peft_model(base, config_for())


@pytest.mark.parametrize("name", MERGEABLE)
def test_a_fixed_mixture_merges_to_the_error_of_quantising(name, folder):
    model = adapted(name, folder, "static")
    for layer in layers_of(model):
        before, delta = layer.get_base_weight().clone(), layer.get_delta_weight("default")
        merged = before + delta
        layer.merge(safe_merge=True)
        error = (layer.get_base_weight() - merged).norm()
        assert 0 < error < ERROR.get(name, 0.15) * merged.norm() < 0.5 * delta.norm()
        layer.unmerge()
        # What was rounded stays rounded: twice as much, as it is quantised twice.
        assert (layer.get_base_weight() - before).norm() < 2 * ERROR.get(name, 0.15) * merged.norm()


@pytest.mark.parametrize("name", MERGEABLE)
def test_merging_and_unloading_leaves_a_quantised_model_that_answers_alike(name, folder):
    model = adapted(name, folder, "static")
    with model.disable_adapter():
        base = logits(model)
    expected = logits(model)
    merged = model.merge_and_unload()
    assert not layers_of(merged)
    assert (logits(merged) - expected).norm() < 0.5 * (expected - base).norm()


@pytest.mark.parametrize("name", UNMERGEABLE)
def test_merging_what_cannot_be_quantised_again_is_refused_and_changes_nothing(name, folder):
    model = adapted(name, folder, "static")
    before = logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MergeError, match="cannot be quantised again after merging"):
            merge()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("name", ["bnb-nf4", "bnb-int8", "torchao-int8"])
def test_a_router_is_refused_merging_as_on_plain_weights(name, folder):
    with pytest.raises(MergeError, match="routes every token by itself"):
        adapted(name, folder).merge_adapter()


@pytest.mark.parametrize("name", ["bnb-nf4", "bnb-int8", "torchao-int8"])
def test_a_model_that_peft_prepared_for_kbit_training_trains(name, folder):
    base = prepare_model_for_kbit_training(
        quantised(name, folder), gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    model, ids = get_peft_model(base, config_for()).train(), tokens()
    assert base.is_gradient_checkpointing
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_second_adapter_finds_the_same_linears(folder):
    model = adapted("hqq", folder)
    model.add_adapter("other", config_for("static"))
    assert len(layers_of(model)) == 7
    assert all(layer.has_adapter("other") for layer in layers_of(model))
    assert not any(isinstance(layer.base_layer, MoLoraLinear) for layer in layers_of(model))


def test_a_quantised_linear_is_named_among_those_a_model_has(folder):
    with pytest.raises(TargetModulesError, match=r"'q_porj'.*'q_proj'.*end in: down_proj, gate_proj"):
        adapted("hqq", folder, target_modules=["q_porj"])


def test_quantised_embeddings_are_no_linears():
    model = plain()
    quantize_(
        model,
        IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerGroup(32)),
        filter_fn=lambda module, name: isinstance(module, nn.Embedding),
    )
    assert type(model.model.embed_tokens.weight) is not nn.Parameter
    adapted_model = get_peft_model(model, config_for())
    assert len(layers_of(adapted_model)) == 7
    with pytest.raises(TargetModulesError, match="is a Embedding, which molora cannot adapt"):
        get_peft_model(adapted_model.unload(), config_for(target_modules=["embed_tokens"]))


def test_gpt2s_transposed_linears_are_adapted_when_quantised(tmp_path):
    tiny.tiny_gpt2(n_embd=64).save_pretrained(tmp_path)
    base = quantised("bnb-nf4", tmp_path)
    expected = logits(base)
    model = get_peft_model(base, config_for("static", target_modules=["c_attn"])).eval()
    assert [layer.out_features for layer in layers_of(model)] == [192, 192]
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    unmerged = logits(model)
    assert (logits(model.merge_and_unload()) - unmerged).norm() < 0.5 * (unmerged - expected).norm()


# Those whose matrices TRL rounds only in part, and those with other products than a bank's.
SPECIAL = ("flylora", "mora-cl", "lorahub", "selma", "mixlora", "mos", "polytropon-mhr", "hydralora", "becotta")


@pytest.mark.parametrize("preset", SPECIAL)
def test_every_kind_of_method_runs_with_its_trained_weights_rounded_as_trl_rounds_them(preset, folder, monkeypatch):
    monkeypatch.setattr(methods, "base_model", lambda *_: quantised("bnb-nf4", folder))
    model = build(preset)
    given, ids = inputs_of(model), tokens()
    exact = model(ids, labels=ids, **given).loss
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    output = model.train()(ids, labels=ids, **given)
    output.loss.backward()
    assert (output.loss - exact).abs() < 0.1
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_the_special_methods_exist():
    assert set(SPECIAL) <= set(SETTINGS)


def test_routing_keeps_its_precision_where_trl_rounds_everything(folder):
    model = adapted("bnb-nf4", folder)
    before, exact = routing_values(model), copy.deepcopy(model.state_dict())
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    restore_routing(model, before)
    for key, value in model.state_dict().items():
        if "molora_router" in key or "molora_threshold" in key:
            assert torch.equal(value, exact[key])
        elif "molora_A" in key:
            assert value.dtype == torch.bfloat16


def test_routing_that_the_trainer_itself_made_becomes_float32(folder):
    model = adapted("bnb-nf4", folder)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    restore_routing(model, {})
    assert {p.dtype for key, p in model.named_parameters() if "molora_router" in key} == {torch.float32}


def test_nothing_is_restored_before_a_model_exists():
    assert routing_values("some/model") == {}
