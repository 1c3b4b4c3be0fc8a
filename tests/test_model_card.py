"""What PEFT saves says what it is: a card lies beside every adapter, whatever it came from."""

from __future__ import annotations

import json

import pytest
import torch
from cards import HUB, TARGETS, WORDS, broken, front_of, on_hub, text_of
from loras import save_lora
from methods import build, config_of
from peft import LoraConfig, PeftModel, get_peft_model
from reports import write_adapter, write_base
from tiny import DECODER, tiny_llama
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from molora.card.job import update_card
from molora.compose import compose
from molora.parameters import count_by_kind
from molora.slim import slim_adapter


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("disk") / "tiny-base")


def test_save_pretrained_leaves_a_card_that_says_what_the_adapter_is(base, tmp_path):
    folder = write_adapter(tmp_path / "adapter", base, "adamole", target_modules=TARGETS)
    text, front = text_of(folder), front_of(folder)
    assert "[More Information Needed]" not in text
    assert "y = W₀x + Σₑ wₑ(x) · sₑ Bₑ Aₑ x" in text
    assert "The method is `adamole`." in text
    assert "https://arxiv.org/abs/2405.00361" in text
    assert "2 q\\_proj, 2 up\\_proj" in text
    counts = count_by_kind(
        (name, value)
        for name, value in build("adamole", target_modules=TARGETS).named_parameters()
        if "molora" in name
    )
    for kind, number in counts.items():
        assert f"- **parameters, {kind}**: {number:,}" in text
    assert "base, tokenizer" not in text
    assert 'PeftModel.from_pretrained(base, "DIR")' in text
    assert "No licence is named for the adapter." in text
    assert front["library_name"] == "peft"
    assert front["pipeline_tag"] == "text-generation"
    assert {"molora", "mixture-of-experts", "lora", "adamole"} <= set(front["tags"])
    assert "license" not in front
    assert "model-index" not in front


@pytest.mark.parametrize(
    ("preset", "used", "weight"),
    [("recommended", "the 2 most probable, and the 2 shared", "1"), ("mocle", "and the 1 shared", "what the others")],
)
def test_shared_experts_are_told_apart_from_routed_ones(preset, used, weight, base, tmp_path):
    text = text_of(write_adapter(tmp_path / "adapter", base, preset, target_modules=TARGETS))
    assert "which the router gives but to shared experts." in text
    assert used in text
    assert f"- **weight of a shared expert**: {weight}" in text


def test_no_path_of_this_machine_gets_into_a_card(base, tmp_path):
    model = on_hub(build("molora", target_modules=TARGETS), str(base))
    model.save_pretrained(tmp_path / "adapter")
    text = text_of(tmp_path / "adapter")
    assert str(base.parent) not in text
    assert "tiny-base" in text
    assert "base_model" not in front_of(tmp_path / "adapter")


def test_a_base_model_of_the_hub_is_named(tmp_path):
    on_hub(build("molora", target_modules=TARGETS)).save_pretrained(tmp_path)
    front = front_of(tmp_path)
    assert front["base_model"] == HUB
    assert f"base_model:adapter:{HUB}" in front["tags"]
    assert f'AutoModelForCausalLM.from_pretrained("{HUB}")' in text_of(tmp_path)


def test_a_config_alone_gets_no_card(tmp_path):
    config_of("molora").save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]


def test_weights_that_are_no_safetensors_get_a_card_without_numbers(tmp_path):
    model = on_hub(build("adamole", target_modules=TARGETS))
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").is_file()
    assert "The method is `adamole`." in text_of(tmp_path)
    assert "**parameters, " not in text_of(tmp_path)


def test_an_adapter_loaded_and_saved_again_has_the_same_card(tmp_path):
    on_hub(build("adamole", target_modules=TARGETS)).save_pretrained(tmp_path / "one")
    on_hub(PeftModel.from_pretrained(tiny_llama(), tmp_path / "one")).save_pretrained(tmp_path / "two")
    assert text_of(tmp_path / "one") == text_of(tmp_path / "two")


def test_several_adapters_of_a_model_have_cards_of_their_own(base, tmp_path):
    model = build("molora", target_modules=TARGETS)
    model.add_adapter("second", config_of("adamole", target_modules=TARGETS))
    on_hub(model, str(base))
    for _ in range(2):  # PEFT writes the path of the base model anew
        model.save_pretrained(tmp_path / "all")
        assert "`molora`" in text_of(tmp_path / "all")
        assert "`adamole`" in text_of(tmp_path / "all" / "second")
    model.save_pretrained(tmp_path / "all", selected_adapters=["second"])
    assert "`molora`" in text_of(tmp_path / "all")
    for path in tmp_path.rglob("README.md"):
        assert str(base) not in path.read_text()


def test_a_folder_of_named_adapters_has_a_card_that_lists_them(base, tmp_path):
    model = get_peft_model(tiny_llama(), config_of("molora", target_modules=TARGETS), adapter_name="first")
    model.add_adapter("second", config_of("adamole", target_modules=TARGETS))
    on_hub(model, str(base)).save_pretrained(tmp_path)
    assert "- [first](first/README.md)\n- [second](second/README.md)" in text_of(tmp_path)
    assert "base_model" not in front_of(tmp_path)
    assert str(base) not in text_of(tmp_path)


@pytest.mark.parametrize("words", ["", "\n", "---\nlicense: mit\n---\n"])
def test_a_readme_above_that_peft_did_not_write_stays_as_it_is(words, tmp_path):
    (tmp_path / "README.md").write_text(words)
    on_hub(build("molora", target_modules=TARGETS)).save_pretrained(tmp_path / "adapter")
    assert text_of(tmp_path) == words
    assert "`molora`" in text_of(tmp_path / "adapter")


def test_a_base_model_in_a_folder_here_is_no_id_elsewhere_either(tmp_path, monkeypatch):
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    (here / "models" / "mine").mkdir(parents=True)
    elsewhere.mkdir()
    monkeypatch.chdir(here)
    model = on_hub(build("molora", target_modules=TARGETS), "models/mine")
    model.save_pretrained(tmp_path / "adapter")
    before = text_of(tmp_path / "adapter")
    monkeypatch.chdir(elsewhere)
    update_card(tmp_path / "adapter")
    assert text_of(tmp_path / "adapter") == before
    model.save_pretrained(tmp_path / "adapter")  # PEFT writes the name as a base model of the hub
    assert text_of(tmp_path / "adapter") == before
    assert "base_model" not in front_of(tmp_path / "adapter")
    path = tmp_path / "adapter" / "README.md"
    path.write_text(before.replace("library_name:", "base_model: me/own\nlibrary_name:"))
    update_card(tmp_path / "adapter")
    assert front_of(tmp_path / "adapter")["base_model"] == "me/own", "what its author names stays"


SMALL = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
HEADS = {
    "one score": ("SEQ_CLS", LlamaForSequenceClassification, LlamaConfig(**DECODER, num_labels=1)),
    "five classes": ("SEQ_CLS", LlamaForSequenceClassification, LlamaConfig(**DECODER, num_labels=5)),
    "three classes of tokens": ("TOKEN_CLS", LlamaForTokenClassification, LlamaConfig(**DECODER, num_labels=3)),
    "a head of two linears": (
        "SEQ_CLS",
        RobertaForSequenceClassification,
        RobertaConfig(**SMALL, num_labels=4, pad_token_id=1),
    ),
}


@pytest.mark.parametrize("case", HEADS)
def test_the_python_of_a_classifiers_card_loads_it(case, tmp_path):
    task_type, kind, config = HEADS[case]
    whole = kind(config).eval()
    whole.base_model.save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "config.json"  # as most base models come: without the head, and without its size
    kept = {
        name: value for name, value in json.loads(file.read_text()).items() if name not in ("id2label", "label2id")
    }
    file.write_text(json.dumps(kept))
    query = "query" if kind is RobertaForSequenceClassification else "q_proj"
    adapter = config_of("molora", target_modules=[query], task_type=task_type)
    model = on_hub(get_peft_model(whole, adapter))
    model.save_pretrained(tmp_path / "adapter")
    python = text_of(tmp_path / "adapter").split("```python\n")[1].split("```")[0]
    found = {}
    exec(python.replace(HUB, str(tmp_path / "base")).replace('"DIR"', repr(str(tmp_path / "adapter"))), found)
    rows = torch.randint(5, 50, (2, 6))
    with torch.no_grad():
        assert torch.allclose(found["model"].eval()(rows).logits, model.eval()(rows).logits, atol=1e-6)


def test_the_card_of_a_plain_lora_above_a_mixture_stays_as_peft_wrote_it(tmp_path):
    plain = get_peft_model(tiny_llama(), LoraConfig(target_modules=TARGETS, task_type="CAUSAL_LM"))
    plain.save_pretrained(tmp_path)
    before = text_of(tmp_path)
    build("molora", target_modules=TARGETS).save_pretrained(tmp_path / "mixture")
    assert text_of(tmp_path) == before
    assert "`molora`" in text_of(tmp_path / "mixture")


def test_composed_experts_are_named_in_the_card(tmp_path):
    folders = [save_lora(tmp_path / f"lora{seed}", seed, target_modules=["q_proj"]) for seed in range(2)]
    compose(tiny_llama(), folders, preset="arrow").save_pretrained(tmp_path / "mix")
    assert "The method is `arrow`." in text_of(tmp_path / "mix")
    assert "- **experts come from**: lora0, lora1" in text_of(tmp_path / "mix")
    assert str(tmp_path) not in text_of(tmp_path / "mix")


def test_a_smaller_adapter_says_what_was_done_and_what_it_is(tmp_path):
    on_hub(build("adamole", target_modules=TARGETS)).save_pretrained(tmp_path / "whole")
    slim_adapter(tmp_path / "whole", tmp_path / "small", drop=[1])
    text, front = text_of(tmp_path / "small"), front_of(tmp_path / "small")
    assert text.index("# A smaller mixture of LoRA experts") < text.index("The method is `adamole`.")
    assert "3 of rank" in text
    assert front["base_model"] == HUB


def test_a_smaller_adapter_whose_card_cannot_be_finished_has_front_matter(tmp_path, monkeypatch, caplog):
    on_hub(build("adamole", target_modules=TARGETS)).save_pretrained(tmp_path / "whole")
    monkeypatch.setattr("molora.card.job.read_source", broken)
    slim_adapter(tmp_path / "whole", tmp_path / "small", drop=[1])
    assert front_of(tmp_path / "small")["library_name"] == "peft"
    assert "# A smaller mixture of LoRA experts" in text_of(tmp_path / "small")
    assert "was left as it is" in caplog.text


def test_no_card_is_read_with_a_warning_of_the_hubs_library(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("huggingface_hub.repocard.logger.warning", lambda *words: said.append(words))
    on_hub(build("adamole", target_modules=TARGETS)).save_pretrained(tmp_path / "whole")
    slim_adapter(tmp_path / "whole", tmp_path / "small", drop=[1])
    (tmp_path / "whole" / "README.md").write_text(WORDS)
    update_card(tmp_path / "whole")
    assert not said


def test_a_card_changes_no_weights_and_no_config(tmp_path):
    model = build("molora", target_modules=TARGETS)
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    update_card(tmp_path, license="mit")
    assert torch.equal(torch.get_rng_state(), state)
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"README.md"}
