"""Exported LoRA folders keep the rules of the servers that read them, above all those that no server checks.

The rules are those of vLLM 0.32 (`vllm/lora/peft_helper.py`, `lora_model.py`, `utils.py`, the layers' `set_lora`) and
those of llama.cpp's `convert_lora_to_gguf.py`. What they drop or fill up silently is a mistake here.
"""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from loras import IDS, edit_config, save_lora
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import tiny_gpt2, tiny_llama, tiny_qwen2
from torch import nn
from transformers.pytorch_utils import Conv1D

from molora.plain.lora import PlainLora, write_lora

MAX_RANK = 512
"""The highest of vLLM's `max_lora_rank`."""

# What vLLM reads only to refuse, with the values it takes.
VLLM_FIELDS = {
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "alora_invocation_tokens": (None, []),
    "layer_replication": (None, []),
    "use_bdlora": (None, {}),
    "use_qalora": (False, None),
    "bias": ("none",),
}
PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
HEADS = ("classifier", "score")


def linears_of(model):
    """Names of a model's linears, with their sizes `(out, in)`."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            found[name] = tuple(module.weight.shape)
        elif isinstance(module, Conv1D):
            found[name] = tuple(reversed(module.weight.shape))
    return found


def by_pattern(patterns, name, otherwise):
    """The first pattern that matches a name or its end behind a dot, as PEFT and vLLM choose it."""
    return next((value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", name)), otherwise)


def vllm_mistakes(folder, linears):
    """What vLLM would refuse in a LoRA folder, drop, or read as something else."""
    config = json.loads((folder / "adapter_config.json").read_text())
    missing = [f"the config has no {name}" for name in ("r", "lora_alpha", "target_modules") if name not in config]
    if missing:
        return missing
    if not (folder / "adapter_model.safetensors").is_file():
        return ["no adapter_model.safetensors"]
    tensors = load_file(folder / "adapter_model.safetensors")
    return config_mistakes(config) + tensor_mistakes(tensors, config, linears)


def config_mistakes(config):
    found = [f"{n} is {config[n]!r}" for n, allowed in VLLM_FIELDS.items() if n in config and config[n] not in allowed]
    found += [f"modules_to_save has {name}" for name in config.get("modules_to_save") or () if name not in HEADS]
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in PLAIN_INITS:
        found.append(f"init_lora_weights is {init!r}")
    ranks = [config["r"], *(config.get("rank_pattern") or {}).values()]
    found += [f"rank {rank!r}" for rank in ranks if not isinstance(rank, int) or not 0 < rank <= MAX_RANK]
    return found


def tensor_mistakes(tensors, config, linears):
    found = []
    pairs = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_(A|B)\.weight", key)
        if match:
            pairs.setdefault(match[1], {})[match[2]] = tensor
        elif not re.search(r"\.(score|classifier)\.(weight|bias)$", key):
            found.append(f"{key} is no LoRA weight")
    for name, pair in pairs.items():
        if name not in linears:
            found.append(f"{name} is no linear of the model and would be dropped")
        elif len(pair) < 2:
            found.append(f"{name} has no {'B' if 'A' in pair else 'A'}")
        else:
            # A factor that is too small is copied into a corner of the server's buffer, without a word.
            (out, width), rank = linears[name], by_pattern(config.get("rank_pattern"), name, config["r"])
            shapes = [tuple(pair[which].shape) for which in "AB"]
            if shapes != [(rank, width), (out, rank)]:
                found.append(f"{name} has shapes {shapes}, not {[(rank, width), (out, rank)]}")
    return found


def converter_mistakes(folder, linears):
    """What llama.cpp's converter, and servers older than vLLM 0.32, would read as something else."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    found = [f"{name} is not read" for name in ("use_rslora", "rank_pattern", "alpha_pattern") if config.get(name)]
    found += [f"{key} stops it" for key in tensors if not re.search(r"\.lora_[AB]\.weight$", key)]
    names = {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in tensors}
    ranks = {len(tensor) for key, tensor in tensors.items() if ".lora_A." in key}
    if len(ranks) != 1:
        found.append(f"one alpha scales ranks {sorted(ranks)} differently")
    return found + [f"{name} is no linear of the model" for name in sorted(names - linears.keys())]


def served(folder, name):
    """The matrix `[out, in]` that vLLM adds to a linear: its scale of B times A."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{name}.lora_{which}.weight"] for which in "AB")
    rank = by_pattern(config["rank_pattern"], name, config["r"])
    alpha = by_pattern(config["alpha_pattern"], name, config["lora_alpha"])
    return b @ a * (alpha / (math.sqrt(rank) if config["use_rslora"] else rank))


def random_lora(model, ranks=(3,), choose=lambda name: True, **fields):
    factors = {}
    for name, (out, width) in linears_of(model).items():
        if name != "lm_head" and choose(name):
            rank = ranks[len(factors) % len(ranks)]
            factors[name] = (torch.randn(rank, width), torch.randn(out, rank) / 4)
    return PlainLora(factors, **fields)


def exported(model, lora, folder, **fields):
    folder.mkdir(exist_ok=True)
    names = [name for name, _ in model.named_modules()]
    write_lora(lora, folder, base_model="base", modules=names, task_type="CAUSAL_LM", **fields)
    return folder


EXPORTS = {
    "one rank": (tiny_llama, {}),
    "rank one": (tiny_llama, {"ranks": (1,)}),
    "unequal ranks": (tiny_llama, {"ranks": (1, 4, 7)}),
    "some of rank zero": (tiny_llama, {"ranks": (0, 4)}),
    "names adapted in one layer only": (tiny_llama, {"choose": lambda name: "layers.1" in name}),
    "one linear": (tiny_llama, {"choose": lambda name: name == "model.layers.0.mlp.down_proj"}),
    "a part of each packed group": (tiny_qwen2, {"choose": lambda name: name.endswith(("q_proj", "up_proj"))}),
    "Qwen2": (tiny_qwen2, {"ranks": (2, 3)}),
    "Conv1D": (tiny_gpt2, {"ranks": (2, 3), "fan_in_fan_out": True}),
}


@pytest.mark.parametrize("case", EXPORTS)
def test_an_exported_folder_keeps_the_rules_of_every_server(case, tmp_path):
    factory, fields = EXPORTS[case]
    model = factory()
    folder = exported(model, random_lora(model, **fields), tmp_path, dtype=torch.bfloat16)
    assert vllm_mistakes(folder, linears_of(model)) == []
    assert converter_mistakes(folder, linears_of(model)) == []


@pytest.mark.parametrize("case", EXPORTS)
def test_what_a_server_adds_is_the_exported_lora_and_what_peft_adds(case, tmp_path):
    factory, fields = EXPORTS[case]
    model = factory()
    lora = random_lora(model, **fields)
    folder = exported(model, lora, tmp_path)
    for name, (a, b) in lora.factors.items():
        torch.testing.assert_close(served(folder, name), b @ a)
    before = model(IDS).logits
    loaded = PeftModel.from_pretrained(model, folder).eval()(IDS).logits
    fresh = factory()
    for name, (a, b) in lora.factors.items():
        fresh.get_submodule(name).weight.data += (b @ a).T if lora.fan_in_fan_out else b @ a
    torch.testing.assert_close(loaded, fresh(IDS).logits, rtol=1e-4, atol=1e-4)
    assert (loaded - before).abs().max() > 1e-3


def rewrite(folder, change):
    """Change the tensors of a folder."""
    path = folder / "adapter_model.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in change(load_file(path)).items()}, path)


FIRST = "base_model.model.model.layers.0.self_attn.q_proj"
BAD = {
    "a bias": (
        lambda folder, model: exported(
            model, replace(random_lora(model), biases={"model.layers.0.mlp.up_proj": torch.ones(64)}), folder
        ),
        "lora_bias is True",
    ),
    "biases of the base model": (lambda f, m: edit_config(f, bias="all"), "bias is 'all'"),
    "a whole embedding": (lambda f, m: edit_config(f, modules_to_save=["lm_head"]), "modules_to_save has lm_head"),
    "DoRA": (lambda f, m: edit_config(f, use_dora=True), "use_dora is True"),
    "PiSSA": (lambda f, m: edit_config(f, init_lora_weights="pissa"), "init_lora_weights is 'pissa'"),
    "an activated LoRA": (
        lambda f, m: edit_config(f, alora_invocation_tokens=[1]),
        r"alora_invocation_tokens is \[1\]",
    ),
    "repeated layers": (lambda f, m: edit_config(f, layer_replication=[[0, 2]]), "layer_replication is"),
    "rank zero": (lambda f, m: edit_config(f, r=0), "rank 0"),
    "a rank above every limit": (
        lambda f, m: exported(m, random_lora(m, (513,), lambda name: "0.self_attn.q" in name), f),
        "rank 513",
    ),
    "a rank that the tensors do not have": (lambda f, m: edit_config(f, r=4), r"has shapes \[\(3, 32\), \(32, 3\)\]"),
    "no targets": (
        lambda f, m: (f / "adapter_config.json").write_text('{"r": 3, "lora_alpha": 3}'),
        "no target_modules",
    ),
    "no tensors": (lambda f, m: (f / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
    "a trained token": (
        lambda f, m: rewrite(
            f,
            lambda t: t | {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(1)},
        ),
        "is no LoRA weight",
    ),
    "a routed mixture": (
        lambda f, m: rewrite(f, lambda t: t | {f"{FIRST}.molora_router.weight": torch.ones(2, 32)}),
        r"molora_router\.weight is no LoRA weight",
    ),
    "half a pair": (
        lambda f, m: rewrite(f, lambda t: {k: v for k, v in t.items() if k != f"{FIRST}.lora_B.weight"}),
        "q_proj has no B",
    ),
    "a linear of another model": (
        lambda f, m: rewrite(f, lambda t: {k.replace("layers.1", "layers.7"): v for k, v in t.items()}),
        r"layers\.7\.self_attn\.q_proj is no linear of the model and would be dropped",
    ),
    "a base model of another width": (
        lambda f, m: exported(tiny_llama(hidden_size=16), random_lora(tiny_llama(hidden_size=16)), f),
        r"q_proj has shapes \[\(3, 16\), \(16, 3\)\], not \[\(3, 32\), \(32, 3\)\]",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_the_rules_find_what_vllm_refuses_or_misreads(case, tmp_path):
    change, message = BAD[case]
    model = tiny_llama()
    exported(model, random_lora(model), tmp_path)
    change(tmp_path, model)
    assert re.search(message, "; ".join(vllm_mistakes(Path(tmp_path), linears_of(model))))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_rslora": True}, "use_rslora is not read"),
        ({"rank_pattern": {"v_proj": 2}}, r"rank_pattern is not read; .*ranks \[2, 4\] differently"),
        ({"alpha_pattern": {"v_proj": 2}}, "alpha_pattern is not read"),
        ({"modules_to_save": ["lm_head"]}, r"lm_head\.weight stops it"),
    ],
    ids=lambda given: next(iter(given)) if isinstance(given, dict) else "",
)
def test_the_rules_find_what_the_converter_of_llama_cpp_misreads(fields, message, tmp_path):
    save_lora(tmp_path, r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], **fields)
    assert re.search(message, "; ".join(converter_mistakes(tmp_path, linears_of(tiny_llama()))))


def test_the_rules_find_a_bias_that_stops_the_converter_of_llama_cpp(tmp_path):
    model = tiny_llama()
    lora = replace(random_lora(model), biases={"model.layers.0.mlp.up_proj": torch.ones(64)})
    mistakes = converter_mistakes(exported(model, lora, tmp_path), linears_of(model))
    assert "base_model.model.model.layers.0.mlp.up_proj.lora_B.bias stops it" in mistakes
