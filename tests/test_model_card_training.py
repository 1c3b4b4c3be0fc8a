"""What trainers save says how it was trained, at every checkpoint, and no card ends a training."""

from __future__ import annotations

import shutil
from pathlib import Path

import kinds
import pytest
from cards import WORDS, broken, front_of, on_hub, text_of
from datasets import Dataset
from reports import write_base
from transformers import Trainer

from molora.card.training import TRAINING, rows_of


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("disk") / "tiny-base")


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


def test_a_card_that_cannot_be_read_costs_no_weights_and_is_kept(sft, tmp_path, caplog):
    text = "---\ntags: [\n---\nMine\n"
    (tmp_path / "README.md").write_text(text)
    sft.save_model(str(tmp_path))
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert text_of(tmp_path) == text
    assert "was left as it is" in caplog.text
    assert not (tmp_path / "_saving").exists()
