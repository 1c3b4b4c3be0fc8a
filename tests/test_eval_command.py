"""`molora eval` on rows: every kind of folder, before and after, and what it refuses."""

from __future__ import annotations

import json
import sys

import pytest
import tiny
import yaml
from peft import LoraConfig, get_peft_model
from reports import write_base
from scoring import adapted, rows, tasks_of, write_rows

from molora import MoloraError, loaded
from molora.commands import evaluate as command
from molora.evaluation import score_tasks
from molora.report import REPORT_FILE

ROUTINGS = {
    "task": {"router": "task", "num_tasks": 2, "selection": "dense"},
    "scores": {"router": "external", "selection": "dense"},
}


@pytest.fixture
def folders(tmp_path):
    """A model, an adapter of it that routes by task, with the run file that made it, and a plain LoRA."""
    base = write_base(tmp_path / "base")
    file = write_rows(tmp_path, rows())
    routed = tmp_path / "routed"
    model = adapted(**ROUTINGS["task"])
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(routed)
    (routed / REPORT_FILE).write_text(json.dumps({"tasks": ["pick", "say"]}))
    run = {
        "model_name_or_path": str(base),
        "output_dir": str(routed),
        "datasets": [{"path": str(file), "eval_path": str(file)}],
        "eval_max_new_tokens": 4,
        "num_experts": 3,
        **ROUTINGS["task"],
    }
    (routed / loaded.RUN_FILE).write_text(yaml.safe_dump(run))
    plain = tmp_path / "plain"
    lora = get_peft_model(tiny.tiny_llama(), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    lora.peft_config["default"].base_model_name_or_path = str(base)
    lora.save_pretrained(plain)
    external = tmp_path / "external"
    model = adapted(**ROUTINGS["scores"])
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(external)
    return {"base": base, "routed": routed, "plain": plain, "external": external, "rows": file}


def test_scores_that_are_given_stand_in_for_those_that_rows_lack(folders, tmp_path):
    found = []
    for scores in ([1.0, 0.0, 0.0], [0.0, 0.0, 1.0]):
        output = tmp_path / f"{scores[0]}.json"
        command.run(str(folders["external"]), data=[str(folders["rows"])], scores=scores, output=str(output))
        found.append([one["value"] for one in json.loads(output.read_text())["scores"]])
    assert found[0] != pytest.approx(found[1], rel=1e-3)


@pytest.mark.parametrize("kind", ["base", "routed", "plain"])
def test_the_command_evaluates_rows_on_every_kind_of_folder(folders, tmp_path, kind, capsys):
    output = tmp_path / "scores.json"
    assert command.run(str(folders[kind]), data=[str(folders["rows"])], limit=4, output=str(output)) == 0
    document = json.loads(output.read_text())
    assert document["kind"] == {"base": "model", "routed": "MOLORA", "plain": "LORA"}[kind]
    assert {score["task"] for score in document["scores"]} == {"pick", "say"}
    assert all(score["count"] <= 4 and score["stderr"] is not None for score in document["scores"])
    assert all("change_stderr" in score for score in document["scores"]) is (kind != "base")
    assert len(document["before"]) == (0 if kind == "base" else len(document["scores"]))
    assert document["versions"].keys() >= {"molora", "torch"}
    assert ("before" in capsys.readouterr().out) is (kind != "base")


def test_answers_are_as_long_as_in_the_run_unless_told_otherwise(folders, monkeypatch):
    seen = []
    monkeypatch.setattr(command, "score_tasks", lambda *_, **options: seen.append(options["max_new_tokens"]) or [])
    for kind, options in (("routed", {}), ("plain", {}), ("routed", {"max_new_tokens": 9})):
        command.run(str(folders[kind]), data=[str(folders["rows"])], base=False, **options)
    assert seen == [4, 64, 9]


def test_the_base_need_not_be_scored(folders, capsys):
    command.run(str(folders["plain"]), data=[str(folders["rows"])], limit=2, base=False)
    assert "before" not in capsys.readouterr().out


def test_the_first_scores_are_those_of_the_model_without_the_adapter(folders, tmp_path):
    found = {}
    for kind in ("base", "routed"):
        output = tmp_path / f"{kind}.json"
        command.run(str(folders[kind]), data=[str(folders["rows"])], output=str(output))
        found[kind] = json.loads(output.read_text())
    values = {
        when: [one["value"] for one in scores]
        for when, scores in found["routed"].items()
        if when in ("before", "scores")
    }
    assert values["before"] == pytest.approx([one["value"] for one in found["base"]["scores"]], rel=1e-5)
    assert values["before"] != pytest.approx(values["scores"], rel=1e-3)


def test_the_command_takes_the_rows_of_the_run(folders, tmp_path):
    output = tmp_path / "scores.json"
    command.run(str(folders["routed"]), output=str(output))
    found = {(s["task"], s["metric"]): s["value"] for s in json.loads(output.read_text())["scores"]}
    config = loaded.read_any_config(str(folders["routed"]))
    model, tokenizer = loaded.load_any(str(folders["routed"]), config, None)
    data = tasks_of(folders["rows"])
    own = score_tasks(model, tokenizer, data, max_new_tokens=4, progress=False)
    assert found == {(score.task, score.metric): pytest.approx(score.value) for score in own}
    assert {metric for _, metric in found} == {"accuracy", "accuracy_norm", "exact_match", "token_f1", "perplexity"}


def test_the_command_writes_over_nothing(folders, tmp_path):
    output = tmp_path / "scores.json"
    output.write_text("mine")
    with pytest.raises(MoloraError, match="nothing is overwritten"):
        command.run(str(folders["base"]), data=[str(folders["rows"])], output=str(output))
    assert output.read_text() == "mine"


COMMANDS = {
    "no rows": ("plain", {}, "does not come with a run file"),
    "base of a base": ("base", {"data": True, "base_model": "x"}, "holds a model itself"),
    "task not read": ("plain", {"data": True, "task": "pick"}, "routing reads no task"),
    "scores not read": ("routed", {"data": True, "scores": [1.0]}, "routing reads no scores"),
    "unknown task": ("routed", {"data": True, "task": "pik"}, "Did you mean 'pick'"),
    "no scores": ("external", {"data": True}, "routing reads scores of the experts"),
    "too few scores": ("external", {"data": True, "scores": [1.0]}, "reads 3 numbers"),
}


@pytest.mark.parametrize(("kind", "given", "message"), COMMANDS.values(), ids=COMMANDS)
def test_the_command_refuses_what_it_cannot_do(folders, kind, given, message):
    options = {**given, "data": [str(folders["rows"])] if given.get("data") else []}
    with pytest.raises(MoloraError, match=message):
        command.run(str(folders[kind]), **options)


def test_the_command_tells_folders_without_a_model(tmp_path):
    for place, message in ((tmp_path / "none", "is no folder"), (tmp_path, "holds neither an adapter")):
        with pytest.raises(MoloraError, match=message):
            command.run(str(place))


def test_tasks_of_the_harness_ask_for_the_harness_where_it_is_not_installed(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MoloraError, match=r"pip install \"molora\[eval\]\""):
        command.run(str(folders["base"]), tasks=["arc_easy"])
