"""What is saved says what it is: the card beside every adapter, and what its author wrote in it."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import kinds
import pytest
import torch
import yaml
from datasets import Dataset
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from loras import save_lora
from methods import SETTINGS, build, config_of
from peft import LoraConfig, PeftModel, get_peft_model
from reports import write_adapter, write_base, write_rows, write_run_file
from tiny import DECODER, tiny_llama
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    Trainer,
)

import molora_cli
from molora import MoLoraConfig
from molora.card.front import merged, model_index
from molora.card.job import update_card
from molora.card.method import preset_of
from molora.card.place import placed
from molora.card.training import TRAINING, rows_of
from molora.compose import compose
from molora.parameters import count_by_kind
from molora.presets import available_presets
from molora.reports.data import Score
from molora.shown import hub_id, is_path, last_part, without_paths
from molora.slim import slim_adapter

HUB = "someone/tiny-llama"
WORDS = "Words of the author."
TARGETS = ["q_proj", "up_proj"]
SMALL = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def broken(*args, **kwargs):
    raise ValueError("broken")


def text_of(folder):
    return (Path(folder) / "README.md").read_text(encoding="utf-8")


def front_of(folder):
    return ModelCard.load(Path(folder) / "README.md").data.to_dict()


def on_hub(model, name=HUB):
    """Let a tiny model think that it was downloaded."""
    model.get_base_model().config._name_or_path = name
    model.get_base_model().name_or_path = name
    for config in model.peft_config.values():
        config.base_model_name_or_path = name
    return model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("disk") / "tiny-base")


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """A finished `molora train` with checkpoints, whose run file names a licence."""
    root = tmp_path_factory.mktemp("run")
    rows = write_rows(root / "rows.jsonl")
    file = write_run_file(root / "run.yaml", base, rows, root / "out", license="mit")
    assert molora_cli.main(["train", str(file)]) == 0
    return root / "out"


# What is saved by PEFT alone


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


# What its author wrote


def test_what_the_author_wrote_around_ours_survives_every_save(tmp_path):
    model = on_hub(build("molora", target_modules=TARGETS))
    model.save_pretrained(tmp_path)
    path = tmp_path / "README.md"
    edited = text_of(tmp_path).replace("# A mixture of LoRA experts on", f"# My own title\n\n{WORDS}\n\nAbout")
    edited = (
        edited.replace("library_name:", "language: en\nlicense: apache-2.0\nlibrary_name:") + f"\nBelow. {WORDS}\n"
    )
    path.write_text(edited)
    model.peft_config["default"].temperature = 2.0
    model.save_pretrained(tmp_path)
    text, front = text_of(tmp_path), front_of(tmp_path)
    assert text.index("# My own title") < text.index("temperature 2") < text.index(f"Below. {WORDS}")
    assert text.count(WORDS) == 2
    assert "temperature 1" not in text
    assert (front["language"], front["license"]) == ("en", "apache-2.0")
    assert "The adapter's licence is `apache-2.0`." in text
    model.save_pretrained(tmp_path)
    assert text_of(tmp_path) == text


TEXTS = {
    "nothing": ("", "# T\n\n[ours]\n"),
    "the author's text alone": (f"# Mine\n\n{WORDS}", f"# Mine\n\n{WORDS}\n\n[ours]\n"),
    "the version that PEFT adds": (f"{WORDS}\n### Framework versions\n\n- PEFT 0.1.2", f"{WORDS}\n\n[ours]\n"),
    "the template": (str(ModelCard.from_template(ModelCard("").data).text), "# T\n\n[ours]\n"),
    "a mark without its end": (f"<!-- molora:begin -->\n{WORDS}", f"{WORDS}\n\n[ours]\n"),
    "an end without its mark": (f"{WORDS}\n<!-- molora:end -->", f"{WORDS}\n\n[ours]\n"),
    "both marks": (f"a\n<!-- molora:begin x -->old<!-- molora:end -->\n{WORDS}", f"a\n[ours]\n{WORDS}"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_our_part_takes_its_place_and_no_more(case):
    text, expected = TEXTS[case]
    found = placed(text, "OURS <!-- molora:end -->", "T")
    block = found[found.index("<!-- molora:begin") : found.index("<!-- molora:end -->") + len("<!-- molora:end -->")]
    assert "OURS" in block
    assert found.replace(block, "[ours]") == expected
    assert placed(found, "OURS", "T") == found, "a second time changes nothing"


def test_the_template_that_an_author_filled_in_stays():
    template = str(ModelCard.from_template(ModelCard("").data).text)
    filled = template.replace("- **Developed by:** [More Information Needed]", "- **Developed by:** me")
    assert "- **Developed by:** me" in placed(filled, "OURS", "T")


def test_a_card_that_cannot_be_read_is_left_alone_and_said_so(base, tmp_path, caplog):
    folder = write_adapter(tmp_path / "adapter", base, target_modules=TARGETS)
    broken = "---\ntags: [\n---\nMine\n"
    (folder / "README.md").write_text(broken)
    with caplog.at_level(logging.WARNING):
        update_card(folder)
    assert text_of(folder) == broken
    assert "was left as it is" in caplog.text
    assert "Correct it" in caplog.text


def test_front_matter_behind_a_mark_of_the_byte_order_stays(base, tmp_path):
    folder = write_adapter(tmp_path / "adapter", base, target_modules=TARGETS)
    (folder / "README.md").write_text(f"---\nlicense: mit\n---\n{WORDS}\n", encoding="utf-8-sig")
    update_card(folder)
    assert front_of(folder)["license"] == "mit"
    assert text_of(folder).startswith("---\nlibrary_name: peft\n")
    assert text_of(folder).count("license: mit") == 1
    assert WORDS in text_of(folder)


# What trainers leave


def trained(kind, folder):
    trainer = kinds.trainer_for(kind, folder, save_strategy="steps", save_steps=1)
    on_hub(trainer.model)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    """A trainer of TRL that took two steps and kept two checkpoints."""
    return trained("sft", tmp_path_factory.mktemp("sft"))


@pytest.mark.parametrize("kind", ["sft", "transformers", "grpo"])
def test_a_trainer_says_how_it_trained(kind, sft, tmp_path):
    trainer = sft if kind == "sft" else trained(kind, tmp_path / "out")
    trainer.save_model(str(tmp_path / "end"))
    numbers = trainer.model.get_nb_trainable_parameters()
    first = Path(trainer.args.output_dir) / "checkpoint-1"
    for folder, steps in ((first, 1), (tmp_path / "end", 2)):
        text = text_of(folder)
        assert f"{numbers[0]:,} of {numbers[1]:,} parameters were trained" in text
        assert f"for {steps} step{'s' * (steps > 1)}, " in text
        assert f"up to step {steps}: " in text
        assert "A token uses " in text
    assert "a checkpoint of a training" in text_of(first)
    assert "| task 0 | 3 | 37.5% |" in text_of(tmp_path / "end")
    trainer.model.save_pretrained(tmp_path / "elsewhere")
    assert "parameters were trained" in text_of(tmp_path / "elsewhere")


@pytest.mark.parametrize("words", [None, f"# Mine\n\n{WORDS}\n"], ids=["no card", "a card without front matter"])
def test_a_model_on_a_local_base_is_saved_twice_without_a_warning(words, base, tmp_path, caplog):
    trainer = kinds.trainer_for("transformers", tmp_path)
    on_hub(trainer.model, str(base))
    if words:
        (tmp_path / "README.md").write_text(words)
    trainer.save_model()
    before = text_of(tmp_path)
    trainer.save_model()
    assert "model card" not in caplog.text
    assert text_of(tmp_path) == before
    assert {"molora", "lora"} <= set(front_of(tmp_path)["tags"])
    assert "base_model" not in front_of(tmp_path)
    assert "mixture of LoRA experts" in before
    assert (words is not None) == (WORDS in before)


def test_a_card_that_a_trainer_leaves_alone_is_named_once_and_where_it_lies(sft, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("molora.card.job.read_source", broken)
    sft.save_model(str(tmp_path))
    warnings = [entry.getMessage() for entry in caplog.records if "model card" in entry.getMessage()]
    assert len(warnings) == 1
    assert f"{tmp_path / 'README.md'} was left as it is: broken" in warnings[0]
    assert (tmp_path / "adapter_model.safetensors").is_file()


IDS = {
    "tasks": ([0, 2, 2], [1, 0, 2]),
    "no task": ([-1, -1], None),
    "some of no task": ([0, -1], None),
    "none": ([None, 1], None),
    "text": (["maths", "words"], None),
    "a number that is no index": ([0, 3_000_000_000], None),
    "shares": ([0.5, 1.0], None),
    "truth": ([True, False], None),
    "no rows": ([], None),
}


@pytest.mark.parametrize("case", IDS)
def test_rows_are_counted_by_task_where_ids_are_indices(case):
    ids, expected = IDS[case]
    found = rows_of(Dataset.from_dict({"task_ids": ids}))
    assert found == {"rows": len(ids), **({"rows_of_tasks": expected} if expected else {})}


def test_ids_that_an_adapter_does_not_read_end_no_training(tmp_path):
    rows = [{**row, "task_ids": -1} for row in kinds.causal()]
    trainer = kinds.trainer_for("transformers", tmp_path, train=rows, save_strategy="steps", save_steps=1)
    trainer.train()
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").is_file()
    assert "parameters were trained" in text_of(tmp_path / "checkpoint-2")


def test_a_fact_that_cannot_be_had_costs_a_warning_and_no_save(tmp_path, monkeypatch, caplog):
    trainer = kinds.trainer_for("transformers", tmp_path, save_strategy="steps", save_steps=1)
    monkeypatch.setattr("molora.card.training.facts_of", broken)
    trainer.train()
    assert "the model card says nothing of how it was trained: broken" in caplog.text
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").is_file()
    assert "were trained" not in text_of(tmp_path / "checkpoint-2")


def test_rows_are_counted_once_for_all_checkpoints_of_a_training(tmp_path, monkeypatch):
    counted = []
    monkeypatch.setattr("molora.card.training.rows_of", lambda rows: counted.append(rows) or rows_of(rows))
    trainer = kinds.trainer_for("transformers", tmp_path, save_strategy="steps", save_steps=1)
    trainer.train()
    assert len(counted) == 1
    trainer.train_dataset = Dataset.from_list(kinds.causal(6))
    trainer.save_model(str(tmp_path))
    assert trainer.state.stateful_callbacks[TRAINING]["attributes"]["rows"] == 6


def test_a_trainer_keeps_the_authors_tags_and_text(sft, tmp_path):
    sft.save_model(str(tmp_path))
    (tmp_path / "README.md").write_text(text_of(tmp_path).replace("tags:\n", "tags:\n- mine\n") + f"\n{WORDS}\n")
    sft.save_model(str(tmp_path))
    assert "mine" in front_of(tmp_path)["tags"]
    assert WORDS in text_of(tmp_path)


def test_a_resumed_training_keeps_what_the_author_wrote_into_a_checkpoint(sft, tmp_path):
    path = Path(shutil.copytree(sft.args.output_dir, tmp_path / "out")) / "checkpoint-1" / "README.md"
    path.write_text(f"{path.read_text()}\n{WORDS}\n")
    trainer = kinds.trainer_for("sft", tmp_path / "out", save_strategy="steps", save_steps=3, max_steps=3)
    trainer.train(resume_from_checkpoint=str(path.parent))
    assert "for 3 steps" in text_of(tmp_path / "out" / "checkpoint-3")
    assert WORDS in path.read_text()


def test_a_checkpoint_changes_no_card_of_an_older_adapter(sft, tmp_path):
    folder = Path(shutil.copytree(sft.args.output_dir, tmp_path / "out"))
    sft.save_model(str(folder))
    before = text_of(folder)
    trainer = kinds.trainer_for("sft", folder, save_strategy="steps", save_steps=1, max_steps=1)
    trainer.train()
    assert "for 1 step, " in text_of(folder / "checkpoint-1")
    assert text_of(folder) == before


def test_what_a_trainer_pushes_has_our_card_and_what_it_was_asked_for(sft, tmp_path, monkeypatch):
    assert not (Path(sft.args.output_dir) / "README.md").exists(), "no card where no adapter is"
    pushed, last = [], Path(sft.args.output_dir) / "checkpoint-2"
    monkeypatch.setattr(sft.args, "output_dir", str(tmp_path))
    monkeypatch.setattr(Trainer, "_push_from_checkpoint", lambda self, folder: pushed.append(text_of(tmp_path)))
    sft._push_from_checkpoint(str(last))
    assert "for 2 steps" in pushed[0]
    sft.save_model()
    sft.create_model_card(license="mit", tags="mine", dataset_name="someone/rows", model_name="tiny")
    text, front = text_of(tmp_path), front_of(tmp_path)
    assert "parameters were trained" in text
    assert (front["license"], front["datasets"]) == ("mit", ["someone/rows"])
    assert {"mine", "sft", "trl", "molora"} <= set(front["tags"])


# What a run leaves


def test_a_run_leaves_its_results_its_data_and_its_file(run, base):
    text, report = text_of(run), json.loads((run / "molora_report.json").read_text())
    assert {score["task"] for score in report["after"]} == {"maths", "words"}
    for score in report["after"]:
        assert f"| {score['task']} | {score['metric'].replace('_', ' ')} | {score['count']} |" in text
    assert "| maths | 5 | 50.0% |\n| words | 5 | 50.0% |" in text
    assert "| rows.jsonl, train | maths | 1 | all |" in text
    for task in report["routing"]:
        assert f"| {task['task']} | {task['tokens']:,} | {task['metrics']['experts_per_token']:.3f} |" in text
    file = yaml.safe_load(text.split("````yaml\n")[1].split("````")[0])
    assert (file["preset"], file["num_experts"], file["license"]) == ("adamole", 4, "mit")
    assert file["model_name_or_path"] == "tiny-base"
    assert [entry["path"] for entry in file["datasets"]] == ["rows.jsonl"] * 2
    assert "The adapter's licence is `mit`." in text
    for place in (base.parent, run.parent):
        assert str(place) not in text


def test_the_scores_of_a_run_are_there_for_the_hub(run):
    front = yaml.safe_load(text_of(run).split("---\n")[1])
    assert front["license"] == "mit"
    report = json.loads((run / "molora_report.json").read_text())
    _, results = model_index_to_eval_results(front["model-index"])
    found = {(one.dataset_name, one.metric_type): one.metric_value for one in results}
    assert found == {(one["task"], one["metric"]): pytest.approx(one["value"], abs=1e-6) for one in report["after"]}
    assert ModelCard(text_of(run)).data.eval_results == results


def test_a_checkpoint_of_a_run_has_the_run_file_and_no_scores_of_the_end(run):
    text = text_of(run / "checkpoint-2")
    assert "````yaml" in text
    assert "for 2 steps" in text
    assert "## Results" not in text


def test_a_run_saved_again_in_its_folder_keeps_what_is_known(run, base, tmp_path):
    before = text_of(run)
    update_card(run)
    assert text_of(run) == before
    model = PeftModel.from_pretrained(tiny_llama(), run)
    model.save_pretrained(tmp_path / "new")
    assert "The method is `adamole`." in text_of(tmp_path / "new")
    assert "## Results" not in text_of(tmp_path / "new")


def test_a_smaller_adapter_does_not_call_the_run_file_its_own(run, tmp_path):
    assert "molora train trains this adapter again" in text_of(run)
    slim_adapter(run, tmp_path / "small", drop=[1])
    text = text_of(tmp_path / "small")
    assert "trains this adapter again" not in text
    assert "The run file of the adapter that this one was made from" in text
    assert "````yaml" in text


def test_only_datasets_of_the_hub_are_named_as_such(base, tmp_path):
    folder = write_adapter(tmp_path / "adapter", base, target_modules=TARGETS)
    (folder / "data" / "beside").mkdir(parents=True)
    paths = {"absolute": "/data/support", "beside": "data/beside", "hub": "org/rows", "mixed": "org/rows"}
    datasets = [{"path": path, "task": task} for task, path in paths.items()]
    datasets[-1]["eval_path"] = "/data/held-out"
    (folder / "molora_run.yaml").write_text(yaml.safe_dump({"datasets": datasets}))
    after = [{"task": task, "metric": "accuracy", "value": 0.5, "count": 9} for task in paths]
    report = {"tasks": list(paths), "before": [], "after": after, "routing": []}
    (folder / "molora_report.json").write_text(json.dumps(report))
    update_card(folder)
    front = front_of(folder)
    assert front["datasets"] == ["org/rows"]
    _, results = model_index_to_eval_results(yaml.safe_load(text_of(folder).split("---\n")[1])["model-index"])
    assert {one.dataset_name: one.dataset_type for one in results} == {
        **{"absolute": "absolute", "beside": "beside", "hub": "org/rows", "mixed": "mixed"}
    }
    assert "| support | absolute |" in text_of(folder), "its name is told all the same"


# The parts

NAMES = {
    "an id": ("org/model", "org/model", "org/model"),
    "an old id": ("gpt2", "gpt2", "gpt2"),
    "a folder": ("/data/models/mine", None, "mine"),
    "a folder at home": ("~/mine", None, "mine"),
    "a folder here": ("./mine", None, "mine"),
    "a folder of Windows": ("C:\\models\\mine", None, "mine"),
    "deep": ("a/b/c", None, "a/b/c"),
    "the hub's cache": ("/x/hub/models--org--model-1/snapshots/0a1b/", "org/model-1", "0a1b"),
    "packaged, converted": ("/x/smollm2-135m-instruct-v1", None, "smollm2-135m-instruct"),
    "packaged": ("smollm2-135m-instruct", None, "smollm2-135m-instruct"),
    "nothing": ("", None, ""),
}


@pytest.mark.parametrize("case", NAMES)
def test_only_ids_of_the_hub_count_as_such(case):
    name, known, shown = NAMES[case]
    assert hub_id(name) == known
    assert last_part(name) == shown
    assert is_path(name) == (shown != name)


def test_a_folder_that_looks_like_an_id_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert hub_id("org/model") is None


PLACES = {
    "a folder in a sentence": ("see /home/me/secret-project", "see secret-project"),
    "two": ("/a/b and then, /c/d/e.", "b and then, e."),
    "at home": ("in ~/work/x and ~me/y", "in x and y"),
    "of Windows": (r"C:\Users\me\x, or D:/data/y", "x, or y"),
    "a share of Windows": (r"on \\server\share\x", "on x"),
    "behind a sign": ("--data=/home/me/x.jsonl 'at:/home/me/y'", "--data=x.jsonl 'at:y'"),
    "a list": ("PATH=/usr/bin:/home/me/bin", "PATH=bin:bin"),
    "a file's address": ("file:///home/me/x y", "x y"),
    "with a slash at its end": ("from /home/me/x/", "from x"),
    "an address": ("https://example.org/a/b", "https://example.org/a/b"),
    "an id": ("org/model and a/b/c", "org/model and a/b/c"),
    "no path": ("1/2, and/or, a / b, </s>, /think, ~ 5", "1/2, and/or, a / b, </s>, /think, ~ 5"),
    "a pattern": (r".*\.(q|v)_proj", r".*\.(q|v)_proj"),
}


@pytest.mark.parametrize("case", PLACES)
def test_of_paths_within_a_text_the_last_part_stays(case):
    text, expected = PLACES[case]
    assert without_paths(text) == expected


def test_a_run_files_text_names_no_folder_of_this_machine(base, tmp_path):
    folder = write_adapter(tmp_path / "adapter", base, target_modules=TARGETS)
    (folder / "molora_run.yaml").write_text(yaml.safe_dump({"run_name": "see /home/me/secret-project"}))
    update_card(folder)
    assert "run_name: see secret-project" in text_of(folder)
    assert "/home/me" not in text_of(folder)


def test_front_matter_of_the_author_stays_and_paths_go():
    old = {"tags": ["mine", "base_model:adapter:/x/y"], "base_model": "/x/y", "language": "de", "datasets": "own/rows"}
    front = merged(old, {"library_name": "peft", "license": None, "datasets": ["org/rows"]}, ["molora"], None)
    assert front == {
        **{"library_name": "peft", "tags": ["mine", "molora"], "language": "de"},
        "datasets": ["own/rows", "org/rows"],
    }


def test_results_of_others_stay_beside_ours():
    score = Score("maths", "accuracy", 50, 0.4, 0.8, (0.07, 0.057))
    first = model_index(None, "tiny", [score], {}, "text-generation")
    own = {"type": "bleu", "value": 0.5}
    first[0]["results"].append({"task": {"type": "x"}, "dataset": {"name": "d", "type": "d"}, "metrics": [own]})
    again = [Score("maths", "accuracy", 60, 0.4, 0.9)]
    second = model_index(first, "other", again, {"maths": "org/m"}, "text-generation")
    assert second[0]["name"] == "tiny"
    metrics = [metric for result in second[0]["results"] for metric in result["metrics"]]
    assert [metric["value"] for metric in metrics] == [0.5, 0.9]
    assert metrics[1]["args"] == {"rows": 60, "without_adapter": 0.4}
    assert first[0]["results"][0]["metrics"][0]["args"]["stderr"] == 0.057
    (bound,) = model_index(None, "tiny", [replace(score, bound=True)], {}, "text-generation")
    assert bound["results"][0]["metrics"][0]["args"]["stderr_at_most"] == 0.057
    assert second[0]["results"][1]["dataset"] == {"name": "maths", "type": "org/m"}
    assert model_index(None, "tiny", [], {}, "text-generation") is None


@pytest.mark.parametrize("preset", available_presets())
def test_a_method_is_told_by_its_choices_or_not_at_all(preset):
    # Two that differ in where the experts come from cannot be told apart without them.
    found = preset_of(config_of(preset))
    assert found == preset or (found, preset) == ("mole", "lora-bank")
    assert preset in SETTINGS


def test_choices_of_ones_own_are_no_method():
    assert preset_of(MoLoraConfig(target_modules=TARGETS, gate="sigmoid", selection="top_p")) is None


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


def test_a_card_that_cannot_be_read_costs_no_weights_and_is_kept(sft, tmp_path, caplog):
    text = "---\ntags: [\n---\nMine\n"
    (tmp_path / "README.md").write_text(text)
    sft.save_model(str(tmp_path))
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert text_of(tmp_path) == text
    assert "was left as it is" in caplog.text
    assert not (tmp_path / "_saving").exists()
