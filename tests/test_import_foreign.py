"""Adapters of other programs as molora adapters: the same outputs, or a refusal that says why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import DYNAMIC, LLAMA, LORAMOE, MIXLORA, MOLA, PHI, PHI3, authors_model, random_tensors, save_moe
from loras import IDS, edit_config
from peft import PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from tiny import DECODER, tiny_llama, tiny_qwen2
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from molora import ConfigError, MoLoraConfig
from molora.imported.foreign import import_adapter


def seeded(kind: Any, config: Any) -> Any:
    torch.manual_seed(0)
    model = kind(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


BASES = {
    "llama": (tiny_llama, LLAMA),
    "qwen2": (tiny_qwen2, LLAMA),
    "mistral": (lambda: seeded(MistralForCausalLM, MistralConfig(**DECODER)), LLAMA),
    "gemma": (lambda: seeded(GemmaForCausalLM, GemmaConfig(**DECODER, head_dim=8)), LLAMA),
    "phi": (lambda: seeded(PhiForCausalLM, PhiConfig(**DECODER | {"num_key_value_heads": 4})), PHI),
    "phi3": (lambda: seeded(Phi3ForCausalLM, Phi3Config(**DECODER)), PHI3),
}
RSLORA = {"use_rslora": True}
OWN_LORA = {"expert_lora": {"r": 2, "lora_alpha": 3, "use_rslora": True, "lora_dropout": 0.1}}
CASES = {
    "mixlora": (MIXLORA, "llama"),
    "mixlora, rsLoRA": (MIXLORA | RSLORA, "llama"),
    "mixlora, top 1": (MIXLORA | {"top_k": 1}, "llama"),
    "mixlora, all experts": (MIXLORA | {"top_k": 4}, "llama"),
    "mixlora, one expert": (MIXLORA | {"top_k": 1, "num_experts": 1}, "llama"),
    "mixlora, experts of their own rank": (MIXLORA | OWN_LORA, "llama"),
    "mixlora, parts of block and attention": (MIXLORA | {"target_modules": ["q_proj", "v_proj", "up_proj"]}, "llama"),
    "mixlora, experts alone": (MIXLORA | {"target_modules": ["gate_proj", "up_proj", "down_proj"]}, "llama"),
    "mixlora, Qwen2": (MIXLORA, "qwen2"),
    "mixlora, Mistral": (MIXLORA, "mistral"),
    "mixlora, Gemma": (MIXLORA, "gemma"),
    "mixlora, Phi": (MIXLORA, "phi"),
    "mixlora, half of Phi": (MIXLORA | {"target_modules": ["q_proj", "fc2"]}, "phi"),
    "mixlora, Phi-3": (MIXLORA, "phi3"),
    "dynamic": (DYNAMIC, "llama"),
    "dynamic, Phi": (DYNAMIC, "phi"),
    "loramoe": (LORAMOE | {"target_modules": ["gate_proj", "up_proj", "down_proj"]}, "llama"),
    "loramoe, attention too": (LORAMOE, "llama"),
    "mola": (MOLA, "llama"),
    "mola, rsLoRA": (MOLA | RSLORA | {"top_k": 1}, "phi"),
}


def checkpoint(folder: Path, config: dict[str, Any], base: str = "llama") -> tuple[Path, Any, dict[str, Any]]:
    """A checkpoint in a folder, its tensors, and its config with the targets of the base model."""
    make, names = BASES[base]
    if config["target_modules"] is LLAMA:
        config = config | {"target_modules": names}
    tensors = random_tensors(make(), config)
    return save_moe(folder, config, tensors), tensors, config


@pytest.mark.parametrize(("config", "base"), CASES.values(), ids=CASES)
def test_a_mixture_of_moe_peft_computes_what_the_authors_code_does(
    config: dict[str, Any], base: str, tmp_path: Path
) -> None:
    folder, tensors, config = checkpoint(tmp_path / "theirs", config, base)
    imported = import_adapter(folder, tmp_path / "ours")
    make = BASES[base][0]
    with torch.no_grad():
        model = PeftModel.from_pretrained(make(), str(tmp_path / "ours")).eval()
        got = model.double()(IDS).logits
        expected = authors_model(make().double(), config, tensors)(IDS).logits
        plain = make().double()(IDS).logits
    assert (expected - plain).abs().max() > 1e-2  # the adapter says something
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    assert imported.preset == config["routing_strategy"]


@pytest.mark.parametrize(("config", "base"), CASES.values(), ids=CASES)
def test_the_file_holds_exactly_the_tensors_of_its_config(config: dict[str, Any], base: str, tmp_path: Path) -> None:
    folder, _, config = checkpoint(tmp_path / "theirs", config, base)
    import_adapter(folder, tmp_path / "ours")
    model = get_peft_model(BASES[base][0](), MoLoraConfig.from_pretrained(str(tmp_path / "ours")))
    shapes = {name: tensor.shape for name, tensor in get_peft_model_state_dict(model).items()}
    written = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert {name: tensor.shape for name, tensor in written.items()} == shapes


def old_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names that m-LoRA wrote."""
    old = {"gate_proj": "w1_proj", "down_proj": "w2_proj", "up_proj": "w3_proj"}
    renamed = {}
    for key, tensor in tensors.items():
        parts = key.split(".")
        if "moe_gate" in parts:
            key = f"mixlora.layers.{parts[2]}.gate.weight"
        elif "experts" in parts:
            key = f"mixlora.layers.{parts[2]}.experts.{parts[6]}.{old[parts[4]]}.{parts[7]}.weight"
        renamed[key] = tensor
    return renamed


def test_the_names_of_m_lora_mean_the_same(tmp_path: Path) -> None:
    folder, tensors, config = checkpoint(tmp_path / "new", MIXLORA)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "w1_proj", "w2_proj", "w3_proj"]
    old = save_moe(
        tmp_path / "old", config | {"routing_strategy": "mixtral", "target_modules": targets}, old_names(tensors)
    )
    import_adapter(folder, tmp_path / "a")
    import_adapter(old, tmp_path / "b")
    written = [load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab"]
    assert written[0].keys() == written[1].keys()
    assert all(torch.equal(tensor, written[1][key]) for key, tensor in written[0].items())


def test_targets_may_be_a_mapping_and_name_linears_that_the_model_lacks(tmp_path: Path) -> None:
    folder, _, config = checkpoint(tmp_path / "a", MIXLORA)
    wanted = dict.fromkeys(LLAMA, True) | {"fc1": True, "qkv_proj": False}
    other, _, _ = checkpoint(tmp_path / "b", config)
    edit_config(other, target_modules=wanted)
    same = [import_adapter(source, tmp_path / f"out{source.name}").config.target_modules for source in (folder, other)]
    assert same[0] == same[1] == set(LLAMA)


@pytest.mark.parametrize(
    ("theirs", "field", "value"),
    [
        ({"lora_dropout": 0.25}, "lora_dropout", 0.25),
        ({"router_aux_loss_coef": 0.01}, "routing_losses", {"load_balancing": 0.01}),
        ({}, "routing_losses", {"load_balancing": 0.001}),
        ({"router_loss": False}, "routing_losses", {}),
        ({"router_init_range": 0.5}, "router_init_range", 0.5),
        ({"jitter_noise": 0.1}, "router_jitter", 0.1),
        ({"top_k": 3}, "top_k", 3),
        ({"sparse_step": 2, "lora_init": "gaussian", "expert_capacity": 32}, "top_k", 2),
        ({"base_model_name_or_path": "someone/model"}, "base_model_name_or_path", "someone/model"),
    ],
)
def test_what_matters_for_further_training_is_taken_over(
    theirs: dict[str, Any], field: str, value: Any, tmp_path: Path
) -> None:
    folder, _, _ = checkpoint(tmp_path / "theirs", MIXLORA | theirs)
    import_adapter(folder, tmp_path / "ours")
    assert getattr(MoLoraConfig.from_pretrained(str(tmp_path / "ours")), field) == value


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bases")
    for name, (make, _) in BASES.items():
        make().config.save_pretrained(root / name)
    tiny_llama(num_hidden_layers=3).config.save_pretrained(root / "deep")
    tiny_llama(intermediate_size=48).config.save_pretrained(root / "narrow")
    return root


@pytest.mark.parametrize(
    ("base", "act_fn"), [("llama", "silu"), ("llama", "swish"), ("gemma", "gelu_pytorch_tanh"), ("phi", "gelu_new")]
)
def test_an_activation_is_accepted_if_the_base_model_has_the_same(
    base: str, act_fn: str, bases: Path, tmp_path: Path
) -> None:
    # MoE-PEFT writes the base model's own into every checkpoint.
    folder, _, _ = checkpoint(tmp_path / "theirs", MIXLORA | {"act_fn": act_fn}, base)
    assert import_adapter(folder, tmp_path / "a", base_model=str(bases / base)).preset == "mixlora"
    edit_config(folder, base_model_name_or_path=str(bases / base))
    assert import_adapter(folder, tmp_path / "b").preset == "mixlora"


@pytest.mark.parametrize(
    ("theirs", "base", "words"),
    [
        ({"act_fn": "relu"}, "llama", "another function than the base model's"),
        ({"act_fn": "silu"}, "gemma", "another function than the base model's"),
        ({"act_fn": "silu"}, None, "can only be told with the base model's config"),
        ({"act_fn": "sillu"}, "llama", "Did you mean 'silu'?"),
        ({}, "deep", "2 layers, and the base model has more"),
        ({}, "narrow", "from 32 to 64, and the base model has one from 32 to 48"),
        ({}, "phi", "the base model has no such linear"),
        ({"target_modules": ["o_proj", "down_proj"]}, None, "which Llama and Phi-3 share"),
    ],
)
def test_what_only_the_base_model_tells_is_checked(
    theirs: dict[str, Any], base: str | None, words: str, bases: Path, tmp_path: Path
) -> None:
    folder, _, _ = checkpoint(tmp_path / "theirs", MIXLORA | theirs)
    with pytest.raises(ConfigError, match=words.replace("?", r"\?")):
        import_adapter(folder, tmp_path / "ours", base_model=str(bases / base) if base else None)
    assert not (tmp_path / "ours").exists()


def test_the_base_model_settles_which_family_it_is(bases: Path, tmp_path: Path) -> None:
    folder, tensors, config = checkpoint(tmp_path / "theirs", MIXLORA | {"target_modules": ["o_proj", "down_proj"]})
    import_adapter(folder, tmp_path / "ours", base_model=str(bases / "llama"))
    with torch.no_grad():
        model = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "ours")).eval()
        torch.testing.assert_close(model(IDS).logits, authors_model(tiny_llama(), config, tensors)(IDS).logits)
