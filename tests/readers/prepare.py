"""Write what every reader of an exported adapter is given: `python prepare.py WORK [LORA]`, where molora is installed.

The base model is the packaged SmolLM2, its 4-bit weights turned into fp32 once, so that a transformers folder and a
GGUF file hold the same numbers and readers differ by rounding alone. WORK then holds

- `base/` and `base.gguf`: the base model;
- `lora/`: the plain LoRA folder LORA, or one with random factors and ranks that differ from linear to linear;
- `lora.gguf` and `merged.gguf`: the same LoRA for llama.cpp, and the base model with it merged in;
- `prompts.json`: token ids, so that no tokenizer comes into it, the id that ends a text, and how many to add.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from gguf import GGUFReader, GGUFValueType, GGUFWriter, dequantize
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from molora.base import PACKAGED, gguf_of, resolve_base
from molora.export.gguf import write_gguf_lora
from molora.export.gguf_model import write_gguf_model
from molora.gguf_names import parameter_name, unpermute
from molora.plain.lora import PREFIX, PlainLora, write_lora

PROMPTS = (
    "The capital of France is",
    "Write a short poem about the sea.\n",
    "def add(a, b):\n",
    "The three primary colours are",
    "Once upon a time there was a",
    "1, 2, 3, 4,",
)
NEW_TOKENS = 24
STRENGTH = 0.08
"""Size of a random LoRA's delta against its input's size: enough to change every text, too little to make noise."""


def prepare(work: Path, given: Path | None) -> None:
    torch.manual_seed(0)
    packaged = gguf_of(PACKAGED)
    write_base(packaged, work)
    config = AutoConfig.from_pretrained(work / "base")
    model = AutoModelForCausalLM.from_pretrained(work / "base")
    if given is None:
        lora = random_lora(model)
        (work / "lora").mkdir()
        names = [name for name, _ in model.named_modules()]
        write_lora(lora, work / "lora", base_model=str(work / "base"), modules=names, task_type="CAUSAL_LM")
    else:
        shutil.copytree(given, work / "lora")
    lora = folder_lora(work / "lora")
    write_gguf_lora(lora, work / "lora.gguf", base_config=config, name="lora")
    write_gguf_model(
        lora,
        work / "merged.gguf",
        template=work / "base.gguf",
        base_config=config,
        weights=lambda name: model.get_submodule(name).weight,
        name="lora",
    )
    tokenizer = AutoTokenizer.from_pretrained(work / "base")
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    (work / "prompts.json").write_text(
        json.dumps({"prompts": prompts, "end": tokenizer.eos_token_id, "new_tokens": NEW_TOKENS})
    )


def write_base(packaged: Path, work: Path) -> None:
    """Write the packaged model with fp32 weights as a GGUF file and as a transformers folder."""
    reader = GGUFReader(packaged)
    heads = {"attn_q": reader.fields["llama.attention.head_count"].contents()}
    heads["attn_k"] = reader.fields["llama.attention.head_count_kv"].contents()
    writer = GGUFWriter(work / "base.gguf", "llama")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], inner)
    weights = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, values)
        name, kind = parameter_name(tensor.name)
        weight = torch.from_numpy(values.copy())
        weights[name] = (unpermute(weight, heads[kind]) if kind in heads else weight).contiguous()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    shutil.copytree(resolve_base(PACKAGED), work / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(weights, work / "base" / "model.safetensors", metadata={"format": "pt"})
    config: PreTrainedConfig = AutoConfig.from_pretrained(work / "base")
    config.dtype = torch.float32
    config.save_pretrained(work / "base")


def random_lora(model: torch.nn.Module) -> PlainLora:
    """A LoRA of all linears of the blocks, with ranks from 2 to 8."""
    factors = {}
    for index, (name, module) in enumerate(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            rank = 2 + index % 7
            a = torch.randn(rank, module.in_features) / module.in_features**0.5
            size = module.weight.norm() / module.out_features**0.5
            factors[name] = (a, torch.randn(module.out_features, rank) * STRENGTH * size / rank**0.5)
    return PlainLora(factors)


def folder_lora(folder: Path) -> PlainLora:
    """Read a plain LoRA folder that molora wrote, which has one rank and no scale."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"], "molora exports the scale inside the factors"
    assert not config["use_rslora"]
    assert not config["rank_pattern"]
    tensors = load_file(folder / "adapter_model.safetensors")
    names = [key.removeprefix(PREFIX).removesuffix(".lora_A.weight") for key in tensors if ".lora_A." in key]
    pairs = {name: tuple(tensors[f"{PREFIX}{name}.lora_{which}.weight"] for which in "AB") for name in names}
    return PlainLora(pairs, fan_in_fan_out=bool(config["fan_in_fan_out"]))


if __name__ == "__main__":
    target = Path(sys.argv[1]).absolute()
    target.mkdir(parents=True)
    prepare(target, Path(sys.argv[2]).absolute() if len(sys.argv) > 2 else None)
