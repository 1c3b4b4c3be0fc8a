"""What `molora train` leaves says its results, its data and its run file, and names no folder of this machine."""

from __future__ import annotations

import json

import pytest
import yaml
from cards import TARGETS, front_of, text_of
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from peft import PeftModel
from reports import write_adapter, write_base, write_rows, write_run_file
from tiny import tiny_llama

import molora_cli
from molora.card.job import update_card
from molora.slim import slim_adapter


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


def test_a_run_files_text_names_no_folder_of_this_machine(base, tmp_path):
    folder = write_adapter(tmp_path / "adapter", base, target_modules=TARGETS)
    (folder / "molora_run.yaml").write_text(yaml.safe_dump({"run_name": "see /home/me/secret-project"}))
    update_card(folder)
    assert "run_name: see secret-project" in text_of(folder)
    assert "/home/me" not in text_of(folder)
