"""The commands, end to end on a tiny model, and what they say when something is wrong."""

from __future__ import annotations

import json

import command_runs
import pytest
import tiny
import torch
import yaml
from command_runs import give_scores
from peft import AutoPeftModelForCausalLM

import molora_cli

base, run_file = command_runs.base, command_runs.run_file


def test_train_saves_an_adapter_that_loads_anywhere_and_reports_what_it_did(run_file, tmp_path, capsys):
    assert molora_cli.main(["train", run_file()]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "out/molora_report.json").read_text())
    history = json.loads((tmp_path / "out/trainer_state.json").read_text())["stateful_callbacks"]["molora"]["history"]
    assert history["molora/"]["entries"], "for reports, also where no checkpoint is saved"
    for entry in report["after"]:
        assert entry["task"] in printed
    assert [(score["task"], score["metric"]) for score in report["after"]] == [
        ("colour", "accuracy"),
        ("colour", "accuracy_norm"),
        ("colour", "perplexity"),
        ("animal", "exact_match"),
        ("animal", "token_f1"),
        ("animal", "perplexity"),
    ]
    assert all("change_stderr" in score for score in report["after"])
    rows = json.loads((tmp_path / "out/molora_rows.json").read_text())
    assert set(rows["digests"]) == {"colour", "animal"}
    assert [len(score["rows"]) for score in rows["after"]] == [score["count"] for score in report["after"]]
    assert [task["task"] for task in report["routing"]] == ["colour", "animal"]
    assert all(1 <= task["metrics"]["experts_per_token"] <= 4 for task in report["routing"])
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.active_peft_config.num_experts == 4


def test_the_resolved_run_file_reproduces_the_adapter_bit_for_bit(run_file, tmp_path):
    from safetensors.torch import load_file

    assert molora_cli.main(["train", run_file()]) == 0
    assert molora_cli.main(["train", "out/molora_run.yaml", "--output_dir", "again"]) == 0
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_generate_and_inspect_use_the_saved_adapter(run_file, capsys):
    molora_cli.main(["train", run_file(evaluate_tasks=False)])
    capsys.readouterr()
    assert molora_cli.main(["generate", "out", "--prompt", "a", "--prompt", "b", "--max-new-tokens", "3"]) == 0
    assert molora_cli.main(["inspect", "out"]) == 0
    printed = capsys.readouterr().out
    for expected in ("4 of rank 4", "adaptive_threshold", "q_proj", "threshold nets", "no, it routes"):
        assert expected in printed
    for in_short in ("Loss: train", " dead: below a tenth", "with a cosine above", "on disk", "needs max_lora_rank"):
        assert in_short in printed


def test_resume_continues_from_the_last_checkpoint(run_file, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "evaluate_tasks": False}
    molora_cli.main(["train", run_file(max_steps=2, **settings)])
    assert molora_cli.main(["train", run_file(max_steps=3, resume_from_checkpoint=True, **settings)]) == 0
    state = json.loads((tmp_path / "out/checkpoint-3/trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 3]


def test_an_existing_adapter_is_trained_on(run_file, tmp_path):
    molora_cli.main(["train", run_file(evaluate_tasks=False)])
    more = run_file(adapter_name_or_path=str(tmp_path / "out"), output_dir="more", evaluate_tasks=False)
    assert molora_cli.main(["train", more, "--learning_rate", "0", "--output_dir", "more"]) == 0
    assert yaml.safe_load((tmp_path / "more/molora_run.yaml").read_text())["num_experts"] == 4
    from safetensors.torch import load_file

    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "more"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_every_task_is_evaluated_by_itself(run_file, tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 3}
    molora_cli.main(["train", run_file(evaluate_tasks=False, **settings)])
    state = json.loads((tmp_path / "out/checkpoint-3/trainer_state.json").read_text())
    logged = {name for entry in state["log_history"] for name in entry}
    assert {"eval_colour_loss", "eval_animal_loss", "molora/experts_per_token"} <= logged


def test_plan_shows_what_would_happen_and_writes_nothing(run_file, tmp_path, capsys):
    assert molora_cli.main(["plan", run_file()]) == 0
    printed = capsys.readouterr().out
    for expected in ("num_experts: 4", "q_proj", "routers", "threshold nets", "optimizer", "colour", "⟦red"):
        assert expected in printed, expected
    assert not (tmp_path / "out").exists()


def test_plan_says_on_how_many_rows_routers_will_be_calibrated(run_file, capsys):
    for rows, expected in ((96, 12), (5, 5)):
        assert molora_cli.main(["plan", run_file(preset="recommended", calibration_rows=rows)]) == 0
        assert f"Routers start from {expected} training rows" in capsys.readouterr().out
    assert molora_cli.main(["train", run_file(preset="recommended", max_steps=1)]) == 0
    capsys.readouterr()
    assert molora_cli.main(["inspect", "out"]) == 0
    assert "linear, input standardised" in " ".join(capsys.readouterr().out.split())
    assert molora_cli.main(["plan", run_file(preset=None, adapter_name_or_path="out", output_dir="next")]) == 0
    printed = capsys.readouterr().out
    assert "router_norm: standardize" in printed
    assert "Routers start" not in printed, "they were calibrated already"


def test_a_loss_between_tasks_is_only_advised_against_for_one(run_file, tmp_path, capsys):
    one = run_file(preset="loramoe", target_modules=["up_proj"], datasets=[{"path": "colour.train.jsonl"}])
    for command in ("plan", "train"):
        assert molora_cli.main([command, one]) == 0
        assert "'localized_balancing' compares tasks, and the data has only one" in capsys.readouterr().out


def test_generate_takes_a_task_by_name_or_id_and_says_which_there_are(run_file, capsys):
    run = run_file(preset="moelora", num_tasks=3)
    assert molora_cli.main(["train", run, "--learning_rate", "1"]) == 0
    assert "--task 'colour'" in capsys.readouterr().out
    asked = ["generate", "out", "--prompt", "a colour 1", "--max-new-tokens", "8"]
    answers = {}
    for name in ("colour", "0", "animal", "1", "2"):
        assert molora_cli.main([*asked, "--task", name]) == 0
        answers[name] = capsys.readouterr().out
    assert answers["colour"] == answers["0"]
    assert answers["animal"] == answers["1"]
    assert len(set(answers.values())) > 1
    for wrong, fragment in ([], "name it"), (["--task", "color"], "'colour'?"), (["--task", "3"], "no task '3'"):
        assert molora_cli.main([*asked, *wrong]) == 2
        said = capsys.readouterr().err
        assert fragment in said
        assert "Known are 0 colour, 1 animal" in said
    assert molora_cli.main([*asked, "--task", "0", "--scores", "1,2"]) == 2
    assert "reads no scores" in capsys.readouterr().err
    assert molora_cli.main(["inspect", "out"]) == 0
    assert "of 3: 0 colour, 1 animal" in capsys.readouterr().out


def test_scores_reach_training_scoring_and_generation(run_file, tmp_path, capsys):
    give_scores(tmp_path)
    assert molora_cli.main(["train", run_file(preset="glider")]) == 0
    asked = ["generate", "out", "--prompt", "a", "--max-new-tokens", "2"]
    assert molora_cli.main([*asked, "--scores=-1,2,0.5,0"]) == 0
    capsys.readouterr()
    for wrong, fragment in ([], "none are given"), (["--scores", "1,2"], "got 2"), (["--task", "a"], "reads no task"):
        assert molora_cli.main([*asked, *wrong]) == 2
        assert fragment in capsys.readouterr().err


SHOWN = {
    "mixlora": ({}, ["spans a feed-forward block"], ["routers", "experts, A"]),
    "perft": ({"target_modules": ["mlp"]}, ["blocks; experts stand beside them"], ["routers", "mlp"]),
    "becotta": (
        {"target_modules": r".*\.layers\.\d+", "num_tasks": 2},
        ["blocks; experts read their output", "the id of a task, of 2"],
        ["layers.*"],
    ),
    "mos": ({"r": 4, "pool_rank": 2}, ["shards", "yes, exactly"], ["pools of shards"]),
    "mola": ({"num_experts": [2, 4]}, ["2, 4 with depth, of rank 8"], []),
    "mocle": ({"num_tasks": 2}, ["1, weight remainder", "depend on what is given"], []),
    "adamoe": ({"num_experts": 4}, ["null experts", "5"], []),
    "mor1e": ({}, ["expert_scores, 32 a row"], ["blends of router and scores"]),
    "mor1e-pairs": ({"num_experts": 6, "r": [2, 3]}, ["6 from 2 rows of A and 3 columns of B", "pairs"], []),
    "smora": ({}, [], ["balancing biases"]),
    "recommended": (
        {},
        ["linear, input to be standardised, not calibrated yet", "top_k (k = 2)", "every token by itself"],
        ["balancing biases", "statistics of what routers read"],
    ),
    "smear": ({}, ["one decision a sequence", "every sequence by itself"], []),
}


@pytest.mark.parametrize("preset", SHOWN)
def test_inspect_says_what_is_special_about_an_adapter(preset, tmp_path, capsys):
    from peft import get_peft_model

    from molora import MoLoraConfig

    fields, summary, kinds = SHOWN[preset]
    config = MoLoraConfig.from_preset(preset, **{"target_modules": "all-linear", **fields})
    get_peft_model(tiny.tiny_llama(), config).save_pretrained(tmp_path / "adapter")
    assert molora_cli.main(["inspect", str(tmp_path / "adapter")]) == 0
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for expected in (*summary, *kinds):
        assert expected in printed, printed


NEW = [
    ("psec", {"num_experts": 3}, "1 new of rank 5", "the first 2"),
    ("recommended", {"lora_alpha": 10}, "2 new of rank 5, alpha 10", "2, weight one"),
]


@pytest.mark.parametrize(("preset", "fields", "new", "more"), NEW)
def test_imported_experts_are_named_and_new_ones_counted(preset, fields, new, more, tmp_path, capsys):
    from peft import LoraConfig, get_peft_model

    from molora.compose import compose

    for index, name in enumerate(("sums", "dates")):
        config = LoraConfig(r=2 + index, target_modules=["q_proj"], init_lora_weights=False)
        get_peft_model(tiny.tiny_llama(), config).save_pretrained(tmp_path / name)
    model = compose(tiny.tiny_llama(), [tmp_path / "sums", tmp_path / "dates"], preset, r=5, **fields)
    model.save_pretrained(tmp_path / "mixture")
    assert molora_cli.main(["inspect", str(tmp_path / "mixture")]) == 0
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for expected in (f"2 imported: sums (rank 2), dates (rank 3); {new}", more, "frozen experts, A"):
        assert expected in printed, printed


def test_plan_counts_adapted_blocks(run_file, capsys):
    assert molora_cli.main(["plan", run_file(preset="perft", target_modules=["mlp"])]) == 0
    printed = capsys.readouterr().out
    assert any(line.split()[1:] == ["mlp", "│", "32", "│", "32", "│", "2", "│"] for line in printed.splitlines()), (
        printed
    )
