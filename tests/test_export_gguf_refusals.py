"""What llama.cpp cannot hold, or a template of another model, is refused with a reason and leaves no file."""

from dataclasses import replace

import gguf_files
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFEndian, GGUFReader
from gguf_files import random_lora, read, write_template
from tiny import tiny_llama, tiny_qwen2
from transformers import AutoConfig

from molora.errors import MoloraError
from molora.export.gguf import write_gguf_lora
from molora.export.gguf_model import write_gguf_model
from molora.plain.lora import PlainLora
from molora.writing import WriteError

llama = gguf_files.llama


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
