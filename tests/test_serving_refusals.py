"""What cannot be served is refused, with a way out that exists; and folders are read strictly."""

from __future__ import annotations

import json
import re
import shutil

import methods
import pytest
import tiny
import torch
from loras import edit_config
from methods import SETTINGS, build
from reports import write_base
from safetensors.torch import load_file, save_file

import molora_cli
from molora import ConfigError
from molora.layouts import LAYOUTS as KNOWN_LAYOUTS
from molora.plan import plan_module
from molora.routing import ROUTERS as KNOWN_ROUTERS
from molora.serving.ranks import served_rank
from molora.serving.refusals import LAYOUTS, ROUTERS, why_not, why_not_module
from molora.serving.skeleton import load_layers
from molora_cli.arguments import parse

LINEAR = "model.layers.0.mlp.down_proj"
SMALL = {"target_modules": ["q_proj", "down_proj"]}
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

REFUSED = {
    "mixlora": "expert_scope='ffn'",
    "mixlora-dynamic": "expert_scope='ffn'",
    "becotta": "stand beside whole blocks",
    "perft": "stand beside whole blocks",
    "smear": "expert_activation, expert_bias, adapter_position='after'",
    "moelora": "fixed by the task of each row",
    "mocle": "fixed by the task of each row",
    "polytropon": "fixed by the task of each row",
    "polytropon-mhr": "fixed by the task of each row",
    "mor1e": "reads scores, which requests do not carry",
    "mor1e-pairs": "reads scores, which requests do not carry",
    "glider": "reads scores, which requests do not carry",
    "x-lora": "more than its own linear's input",
    "pmoe": "more than its own linear's input",
}
"""The presets that cannot be served, and what of them is in the way."""

CHOICES = {
    "router=mlp": ("mole", {"router": "mlp"}, "router='mlp' is not one product of the input"),
    "router=normalized": ("mole", {"router": "normalized"}, "router='normalized' is not one product"),
    "router=recurrent": ("mole", {"router": "recurrent"}, "router='recurrent' is not one product"),
    "cosine of a projection": ("mole", {"router": "cosine", "router_dim": 3}, "cosine with router_dim"),
    "router=external": ("mole", {"router": "external"}, "fixed by the scores of each row"),
    "router=task": ("mole", {"router": "task", "num_tasks": 3}, "fixed by the task of each row"),
    "score_weight": ("mole", {"score_weight": 1.0}, "reads scores"),
    "router_level": ("mole", {"router_level": "sequence"}, "more than its own linear's input"),
    "router_input": ("mole", {"router_input": "base", "router_level": "sequence"}, "more than its own linear's input"),
    "a router for a block": ("mole", {"router_sharing": "block"}, "more than its own linear's input"),
    "expert_activation": ("mole", {"expert_activation": "gelu"}, r"\(expert_activation\)"),
    "expert_bias": ("mole", {"expert_bias": True}, r"\(expert_bias\)"),
    "modules_to_save": ("mole", {"modules_to_save": ["lm_head"]}, r"more than experts \(modules_to_save\)"),
    "trainable tokens": ("mole", {"trainable_token_indices": [1]}, r"more than experts \(trainable_token_indices\)"),
    "biases": ("mole", {"bias": "all"}, r"more than experts \(bias\)"),
    "biases and modules": (
        "static",
        {"bias": "molora_only", "modules_to_save": ["lm_head"]},
        r"more than experts \(modules_to_save and bias\)",
    ),
}
"""A preset, what is chosen otherwise, and what is in the way."""

CASES = {preset: (preset, {}, why) for preset, why in REFUSED.items()} | CHOICES
LED_OUT = [
    *("mixlora", "moelora", "glider", "x-lora", "pmoe", "router=mlp", "router=external"),
    *("a router for a block", "modules_to_save", "biases and modules"),
]
"""One refusal of each kind: their commands are run."""


def reason(preset, **overrides):
    config = methods.config_of(preset, **overrides)
    return why_not(config) or why_not_module(config, plan_module(config, LINEAR, 2))


def commands(sentence):
    """Every command that a sentence offers, whole: an option by itself stands for the end of the one before."""
    found = []
    for words in re.findall(r"`([^`]*)`", sentence):
        if words.startswith("molora "):
            found.append(words.split()[1:])
        else:
            start = found[-1][:3] + ([] if "--as" in words else ["--as", "lora"])
            found.append([*start, *words.split()])
    return found


def filled(words, **values):
    """A command with its placeholders replaced."""
    return [values.get(word.replace(",", "").rstrip("."), word) for word in words]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"))


def write_rows(file, experts):
    """Rows to calibrate with, of a few tasks, with a score for every expert."""
    rows = [
        {
            "messages": [{"role": "user", "content": f"a{i}"}, {"role": "assistant", "content": "bcd"[: 1 + i % 3]}],
            "task": f"task {i % 3}",
            "expert_scores": [(1 + i * e % 5) / 5 for e in range(experts)],
        }
        for i in range(18)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.mark.parametrize("preset", SETTINGS)
def test_a_preset_is_servable_or_refused_for_what_it_is(preset):
    found = reason(preset)
    if preset not in REFUSED:
        assert found is None
    else:
        assert REFUSED[preset] in found


@pytest.mark.parametrize("case", CASES)
def test_a_refusal_names_what_is_in_the_way_and_commands_that_parse(case):
    preset, overrides, why = CASES[case]
    sentence = reason(preset, **overrides)
    assert re.search(re.escape(why) if case in REFUSED else why, sentence)
    offered = commands(sentence)
    if not offered:  # no LoRA replaces experts beside a block
        assert case in ("becotta", "perft")
        assert "run it in PyTorch, or train one with expert_scope='linear'" in sentence
    for words in offered:
        parsed = parse(filled(words, NN="0.1,0.9"))
        assert parsed.target in ("lora", "tasks", "dense")
        assert (parsed.directory, parsed.out) == ("DIR", "OUT")


@pytest.mark.parametrize("case", LED_OUT)
def test_the_ways_out_lead_to_what_servers_load(case, base, tmp_path):
    """Each command of a refusal, run on an adapter that is refused."""
    preset, overrides, _ = CASES[case]
    folder, experts = tmp_path / "adapter", methods.config_of(preset, **overrides).num_experts
    build(preset, **({} if preset == "mixlora" else SMALL), **overrides).save_pretrained(folder)
    data = write_rows(tmp_path / "rows.jsonl", experts)
    for number, words in enumerate(commands(reason(preset, **overrides))):
        out = tmp_path / f"out{number}"
        given = {"DIR": str(folder), "OUT": str(out), "data.jsonl": data, "NAME": "1", "TEXT": "abc"}
        line = filled(words, **given, NN=",".join(["0.5"] * experts))
        assert molora_cli.main([*line, "--base-model", str(base)]) == 0, line
        assert list(out.rglob("*.safetensors"))


@pytest.mark.parametrize(("names", "known"), [(ROUTERS, KNOWN_ROUTERS), (LAYOUTS, KNOWN_LAYOUTS)])
def test_what_is_called_servable_exists(names, known):
    assert set(names) < set(known)


def base_config(**sizes):
    model = tiny.tiny_llama(**sizes)
    model.config.architectures = ["LlamaForCausalLM"]
    return model.config


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with statistics, thresholds and a balancing bias, which every test copies before it spoils it."""
    folder = tmp_path_factory.mktemp("whole") / "adapter"
    fields = {"router_norm": "standardize", "balance_bias_rate": 0.01, **SMALL}
    build("adamole", **fields).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "adapter")


def change(folder, name=None, tensor=None):
    """Replace a tensor of the file, add it, or, if there is none, take it out; by the end of its name."""
    tensors = load_file(folder / WEIGHTS)
    key = next((key for key in tensors if key.endswith(name)), f"base_model.model.{name}")
    tensors.pop(key, None)
    save_file(tensors | ({} if tensor is None else {key: tensor}), folder / WEIGHTS)


def truncate(folder, name):
    file = folder / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


Q = "layers.1.self_attn.q_proj.molora_"
DAMAGES = {
    "truncated weights": (lambda f: truncate(f, WEIGHTS), f"damaged {WEIGHTS}"),
    "empty weights": (lambda f: (f / WEIGHTS).write_bytes(b""), f"damaged {WEIGHTS}"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), f"no {WEIGHTS}"),
    "weights as a pickle": (
        lambda f: (torch.save(load_file(f / WEIGHTS), f / "adapter_model.bin"), (f / WEIGHTS).unlink()),
        f"no {WEIGHTS}",
    ),
    "truncated config": (lambda f: truncate(f, CONFIG), f"{CONFIG} that cannot be read"),
    "a config that is no object": (lambda f: (f / CONFIG).write_text("[1]"), f"{CONFIG} that cannot be read"),
    "no config": (lambda f: (f / CONFIG).unlink(), f"no {CONFIG}"),
    "a plain LoRA's config": (lambda f: edit_config(f, peft_type="LORA"), "of type LORA, not MOLORA"),
    "a newer format": (lambda f: edit_config(f, format_version=99), "written in format 99.*Upgrade molora"),
    "a field nobody knows": (lambda f: edit_config(f, top_kk=1), r"unknown fields: top_kk\. Did you mean 'top_k'"),
    "a wrong value": (lambda f: edit_config(f, gate="sofmax"), "Did you mean 'softmax'"),
    "A missing": (lambda f: change(f, Q + "A.weight"), "lacks .*q_proj.molora_A.*folder complete"),
    "B missing": (lambda f: change(f, Q + "B.weight"), "lacks .*q_proj.molora_B"),
    "a router missing": (lambda f: change(f, Q + "router.weight"), "lacks .*q_proj.molora_router"),
    "statistics missing": (lambda f: change(f, Q + "router.input_mean"), "lacks .*q_proj.molora_router.*input_mean"),
    "a threshold missing": (lambda f: change(f, Q + "threshold.bias"), "lacks .*q_proj.molora_threshold"),
    "a balancing bias missing": (lambda f: change(f, Q + "bias.weight"), "lacks .*q_proj.molora_bias"),
    "a tensor too many": (
        lambda f: change(f, "model.layers.0.self_attn.q_proj.molora_router.bias", torch.zeros(4)),
        "do not explain: .*molora_router.*bias",
    ),
    "a module too many": (
        lambda f: change(f, "model.layers.0.self_attn.v_proj.molora_A.weight", torch.zeros(16, 32)),
        "do not explain: .*v_proj",
    ),
    "A of another shape": (lambda f: change(f, Q + "A.weight", torch.zeros(15, 32)), "size mismatch.*molora_A"),
    "a router of another shape": (lambda f: change(f, Q + "router.weight", torch.zeros(4, 31)), "size mismatch"),
    "more experts than tensors": (lambda f: edit_config(f, num_experts=5), "size mismatch"),
    "another rank than tensors": (lambda f: edit_config(f, r=2), "size mismatch"),
    "other targets": (lambda f: edit_config(f, target_modules=["q_proj"]), "do not explain: .*down_proj"),
    "targets that are not there": (lambda f: edit_config(f, target_modules=["c_attn"]), "c_attn"),
    "embeddings": (lambda f: edit_config(f, target_modules=["q_proj", "embed_tokens"]), "embed_tokens"),
    "modules_to_save": (lambda f: edit_config(f, modules_to_save=["lm_head"]), "modules_to_save.*--as dense"),
    "bias": (lambda f: edit_config(f, bias="all"), "bias.*--as dense"),
    "no folder": (shutil.rmtree, "is no folder"),
}
"""What is done to a folder, and what the error has to say."""


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused(damage, folder):
    spoil, said = DAMAGES[damage]
    load_layers(folder, base_config())  # it was whole
    spoil(folder)
    with pytest.raises(ConfigError) as error:
        load_layers(folder, base_config())
    assert str(folder) in str(error.value)
    assert re.search(said, str(error.value), re.DOTALL)


BASES = {
    "more layers": ({"num_hidden_layers": 3}, r"lacks .*layers\.2"),
    "fewer layers": ({"num_hidden_layers": 1}, r"layers\.1"),
    "wider": ({"hidden_size": 64}, "does not fit the base model.*size mismatch"),
    "a wider feed-forward": ({"intermediate_size": 48}, "does not fit the base model.*size mismatch"),
}


@pytest.mark.parametrize("other", BASES)
def test_an_adapter_of_another_base_model_is_refused(other, folder):
    sizes, said = BASES[other]
    with pytest.raises(ConfigError) as error:
        load_layers(folder, base_config(**sizes))
    assert str(folder) in str(error.value)
    assert re.search(said, str(error.value), re.DOTALL)


@pytest.mark.parametrize("names", [["NoSuchModel"], [], None])
def test_an_architecture_that_transformers_does_not_have_is_refused(names, folder):
    base = base_config()
    base.architectures = names
    with pytest.raises(ConfigError, match="no architecture") as error:
        load_layers(folder, base)
    assert str(folder) in str(error.value)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_an_adapted_output_layer_is_refused_before_and_in_the_engine(tmp_path):
    build("mole", target_modules=["q_proj", "lm_head"]).save_pretrained(tmp_path / "adapter")
    for refuse in (
        lambda: load_layers(tmp_path / "adapter", base_config()),
        lambda: served_rank(tmp_path / "adapter", torch.float32),
    ):
        with pytest.raises(ConfigError, match=r"adapts the output layer .*molora export"):
            refuse()


@pytest.mark.parametrize("case", ["x-lora", "moelora", "router=mlp", "mixlora", "becotta", "modules_to_save"])
def test_a_folder_is_refused_with_and_without_its_base_model(case, tmp_path):
    preset, overrides, _ = CASES[case]
    folder = tmp_path / "adapter"
    build(preset, **({} if preset in ("mixlora", "becotta") else SMALL), **overrides).save_pretrained(folder)
    sentence = reason(preset, **overrides)
    for refuse in (lambda: load_layers(folder, base_config()), lambda: served_rank(folder, torch.float32)):
        with pytest.raises(ConfigError) as error:
            refuse()
        assert str(folder) in str(error.value)
        assert sentence in str(error.value)


def test_nothing_of_a_folder_is_executed(folder, tmp_path):
    """A pickle beside the weights, in every name that loaders look for, is not opened."""

    class Trap:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'executed')!r}, 'w')",))

    for name in ("adapter_model.bin", "pytorch_model.bin", "training_args.bin"):
        torch.save(Trap(), folder / name)
    load_layers(folder, base_config())
    assert not (tmp_path / "executed").exists()
    torch.load(folder / "training_args.bin", weights_only=False)
    assert (tmp_path / "executed").exists()  # the trap works
