"""What tests of files for llama.cpp share: its names and order of rows by hand, templates, and how files are read."""

import re

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFEndian, GGUFReader, GGUFWriter, dequantize, quantize
from tiny import tiny_llama, tiny_qwen2
from torch import nn
from transformers.pytorch_utils import Conv1D

from molora.plain.lora import PlainLora

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


@pytest.fixture(params=[tiny_llama, tiny_qwen2], ids=["llama", "qwen2"])
def model(request):
    return request.param()


@pytest.fixture
def llama():
    return tiny_llama()
