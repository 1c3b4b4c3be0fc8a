"""What `molora train`, `plan`, `generate` and `inspect` refuse, and with which words."""

from __future__ import annotations

import json

import command_runs
import pytest
import tiny
from command_runs import give_scores

import molora_cli

base, run_file = command_runs.base, command_runs.run_file


def _empty(tmp_path):
    (tmp_path / "colour.train.jsonl").write_text("")


def _no_answers(tmp_path):
    row = {"prompt": "a colour", "completion": ""}
    (tmp_path / "colour.train.jsonl").write_text(json.dumps(row) + "\n")


def _broken_json(tmp_path):
    (tmp_path / "colour.train.jsonl").write_text('{"text": "a"}\n{"text": \n')


def _other_columns(tmp_path):
    (tmp_path / "colour.train.jsonl").write_text('{"question": "a", "reply": "b"}\n')


def _other_tasks(tmp_path):
    (tmp_path / "colour.train.jsonl").write_text('{"task": "colors", "text": "abc"}\n')


MISTAKES = {
    "empty dataset": (_empty, {}, ["run.yaml:", "colour.train.jsonl", "empty"]),
    "nothing to learn": (_no_answers, {}, ["'colour'", "token to learn"]),
    "too short to learn": (None, {"max_length": 2}, ["max_length=2"]),
    "broken JSON": (_broken_json, {}, ["run.yaml:", "colour.train.jsonl:2"]),
    "unknown columns": (_other_columns, {}, ["question", "messages"]),
    "unknown task": (_other_tasks, {}, ["no row of task 'colour'", "colors"]),
    "target without match": (None, {"target_modules": ["q_prj"]}, ["run.yaml:", "q_prj", "Did you mean 'q_proj'"]),
    "model without config": (None, {"model_name_or_path": "."}, ["run.yaml:", "config.json"]),
}


@pytest.mark.parametrize("command", ["train", "plan"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_readable_message_exit_code_2_and_nothing_written(
    mistake, command, run_file, tmp_path, capsys
):
    spoil, changes, fragments = MISTAKES[mistake]
    if spoil:
        spoil(tmp_path)
    path = run_file(**changes)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert molora_cli.main([command, path]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    for fragment in fragments:
        assert fragment in said, said
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_a_folder_in_use_is_left_alone_unless_told_otherwise(run_file, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("keep")
    assert molora_cli.main(["train", run_file()]) == 2
    said = capsys.readouterr().err
    assert all(fragment in said for fragment in ("run.yaml:", "output_dir", "overwrite"))
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["precious.txt"]
    assert molora_cli.main(["plan", run_file()]) == 0
    assert "`molora train` would stop" in capsys.readouterr().out
    assert molora_cli.main(["train", run_file(evaluate_tasks=False), "--overwrite"]) == 0
    assert (tmp_path / "out" / "precious.txt").read_text() == "keep"


def _continue(tmp_path, base, preset="adamole"):
    """Make an adapter to continue from, without training one."""
    from peft import LoraConfig, get_peft_model

    from molora import MoLoraConfig

    config = (
        MoLoraConfig.from_preset(preset, target_modules=["q_proj"])
        if preset
        else LoraConfig(target_modules="all-linear")
    )
    get_peft_model(tiny.tiny_llama(), config).save_pretrained(tmp_path / "existing")


NOT_CONTINUED = {
    "a plain LoRA": (None, {}, ["run.yaml:", "adapter_name_or_path", "LORA, not MOLORA"]),
    "other experts": ("adamole", {"num_experts": 6}, ["run.yaml:", "num_experts", "got 6", "made with 8"]),
}


@pytest.mark.parametrize("case", NOT_CONTINUED)
def test_an_adapter_is_only_continued_as_what_it_is(case, run_file, tmp_path, base, capsys):
    preset, changes, fragments = NOT_CONTINUED[case]
    _continue(tmp_path, base, preset)
    path = run_file(adapter_name_or_path=str(tmp_path / "existing"), **changes)
    assert molora_cli.main(["train", path]) == 2
    said = capsys.readouterr().err
    assert all(fragment in said for fragment in fragments), said


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern", "exclude_modules", "modules_to_save"])
def test_names_that_match_no_module_are_mistakes_in_a_run_file(field, run_file, capsys):
    wrong = {"nothing_like_it": 3} if "pattern" in field else ["nothing_like_it"]
    assert molora_cli.main(["plan", run_file(**{field: wrong})]) == 2
    said = capsys.readouterr().err
    assert all(fragment in said for fragment in ("run.yaml:", field, "nothing_like_it")), said


def test_training_that_diverged_fails_and_saves_nothing(run_file, tmp_path, capsys):
    arguments = ["--learning_rate", "1e30", "--max_grad_norm", "0", "--evaluate_tasks", "false"]
    assert molora_cli.main(["train", run_file(), *arguments]) == 1
    assert "training diverged" in capsys.readouterr().err
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


DAMAGE = {
    "config": ("adapter_config.json", b"[1", "cannot be read"),
    "format": ("adapter_config.json", b'{"peft_type": "MOLORA", "format_version": 9}', "Upgrade molora"),
    "kind": ("adapter_config.json", b'{"peft_type": "FOO"}', "type FOO, not MOLORA"),
    "weights": ("adapter_model.safetensors", b"nonsense", "damaged adapter_model.safetensors"),
}


@pytest.mark.parametrize("what", DAMAGE)
@pytest.mark.parametrize("command", [["inspect"], ["generate", "--prompt", "a"]])
def test_a_damaged_adapter_is_named(what, command, tmp_path, base, capsys):
    _continue(tmp_path, base)
    name, content, said = DAMAGE[what]
    (tmp_path / "existing" / name).write_bytes(content)
    assert molora_cli.main([command[0], str(tmp_path / "existing"), *command[1:]]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["generate", "nowhere", "--prompt", "a"], ["inspect", "nowhere"]])
def test_a_folder_without_adapter_is_named(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert molora_cli.main(arguments) == 2
    assert "nowhere is no folder" in capsys.readouterr().err


NEEDS = {
    "scores": (None, {"preset": "glider"}, ["run.yaml:2: preset", "reads expert_scores", "4 numbers"]),
    "scores by a field": (
        None,
        {"router": "external", "selection": "dense"},
        ["run.yaml:", "router: the routing reads expert_scores"],
    ),
    "as many scores": (
        lambda path: give_scores(path, 3),
        {"preset": "mor1e"},
        ["run.yaml:3: num_experts", "has 3"],
    ),
    "scores of every row": (
        lambda path: give_scores(path, 4, ["colour"]),
        {"preset": "glider"},
        ["animal.train.jsonl:1: no `expert_scores`", "colour.train.jsonl:1"],
    ),
    "equal layers": (
        lambda path: give_scores(path),
        {"preset": "glider", "num_experts": [2, 4]},
        ["num_experts: expert_scores need the same number"],
    ),
    "tasks": (
        None,
        {"preset": "moelora", "num_tasks": 1},
        ["num_tasks: num_tasks is 1", "2 tasks (colour, animal)", "at least 2"],
    ),
    "groups": (
        None,
        {"preset": "loramoe", "routing_losses": {"localized_balancing": {"coefficient": 0.1, "groups": 1}}},
        ["routing_losses: localized_balancing has 1 groups", "its `groups` to 2"],
    ),
}


@pytest.mark.parametrize("command", ["train", "plan"])
@pytest.mark.parametrize("need", NEEDS)
def test_a_routing_that_the_data_does_not_allow_is_refused_early(need, command, run_file, tmp_path, capsys):
    prepare, changes, fragments = NEEDS[need]
    if prepare:
        prepare(tmp_path)
    # Never reached: the model is loaded later.
    assert molora_cli.main([command, run_file(**changes), "--model_name_or_path", "no/model"]) == 2
    said = capsys.readouterr().err
    assert all(fragment in said for fragment in fragments), said
