"""The strict run-file loader: every mistake is found, at its line, with what to write instead."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from molora.config import MoLoraConfig
from molora.errors import ConfigError
from molora.runfile import RunFile, check_output_dir, json_schema, load_run_file
from molora.runfile.keys import dataset_keys, top_level_keys
from molora.runfile.renamed import REFUSED, RENAMED, RENAMED_IN_DATASETS

# Lines 1 to 7; what a test appends starts at line 8.
GOOD = """\
model_name_or_path: smollm2-135m-instruct
preset: adamole
target_modules: all-linear
datasets:
  - path: data/train.jsonl
    task: sentiment
output_dir: out
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / "data" / name).write_text("{}\n")
    return tmp_path


def load(text: str, *overrides: str) -> RunFile:
    Path("run.yaml").write_text(text, encoding="utf-8")
    return load_run_file("run.yaml", overrides)


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(text, *overrides)
    return [str(problem) for problem in caught.value.problems]


# Name: lines appended to GOOD, and what the one problem reported must contain.
BROKEN = {
    "unknown key": ("learning_rte: 1e-4", ["run.yaml:8: learning_rte", "unknown key", "'learning_rate'"]),
    "unknown key, nothing close": ("zzzz: 1", ["run.yaml:8: zzzz", "unknown key", "molora schema"]),
    "unknown adapter key": ("num_expert: 4", ["run.yaml:8", "'num_experts'"]),
    "duplicate key": ("output_dir: other", ["run.yaml:8: output_dir", "twice", "line 7"]),
    "duplicate nested key": ("routing_losses: {z: 1, z: 2}", ["run.yaml:8: routing_losses.z", "given twice"]),
    "float for int": ("max_steps: 2.5", ["run.yaml:8: max_steps", "2.5", "whole number"]),
    "whole float for int": ("max_steps: 1e3", ["max_steps", "1000.0", "Write 1000."]),
    "text for int": ('num_experts: "8"', ["run.yaml:8: num_experts", "'8'", "whole number", "Write 8"]),
    "boolean for int": ("num_experts: true", ["num_experts", "got true", "whole number"]),
    "separator in number": ("max_steps: 1_000", ["max_steps", "'1_000'", "Write 1000"]),
    "text for float": ('learning_rate: "1e-4"', ["learning_rate", "'1e-4'", "a number", "Write 0.0001"]),
    "list for float": ("learning_rate: [1, 2]", ["learning_rate", "[1, 2]", "a number"]),
    "infinite float": ("learning_rate: .inf", ["learning_rate", "Infinity", "a number", "finite"]),
    "number for text": ("run_name: 7", ["run_name", "got 7", "text", "'7'"]),
    "on for bool": ("bf16: on", ["run.yaml:8: bf16", "'on'", "true or false", "Write true"]),
    "no for bool": ("evaluate_tasks: no", ["evaluate_tasks", "'no'", "Write false"]),
    "number for bool": ("overwrite: 1", ["overwrite", "got 1", "true or false"]),
    "null for int": ("num_experts:", ["num_experts", "null", "whole number"]),
    "leading zero": ("max_steps: 08", ["run.yaml:8: max_steps", "08", "write 8"]),
    "choice": ("dtype: bf16", ["dtype", "'bf16'", "'float16'", "Did you mean 'bfloat16'"]),
    "choice of an enum": ("eval_strategy: step", ["eval_strategy", "'no', 'steps', 'epoch'", "Did you mean 'steps'"]),
    "choice in a list": ("report_to: [wandb, tensorbord]", ["report_to.1", "Did you mean 'tensorboard'"]),
    "choice beside a field": ("train_sampling_strategy: rando", ["train_sampling_strategy", "'random'"]),
    "choice of the adapter": ("selection: topk", ["run.yaml:8: selection", "'top_k'"]),
    "below the least": ("gradient_accumulation_steps: 0", ["gradient_accumulation_steps", "at least 1"]),
    "zero steps": ("max_steps: 0", ["max_steps", "-1, or a whole number of at least 1"]),
    "two bounds": ("adam_beta1: 1.0", ["adam_beta1", "at least 0 and below 1"]),
    "item of a list": ("exclude_modules:\n  - q_proj\n  - 3", ["run.yaml:10: exclude_modules.1", "got 3", "text"]),
    "value of a mapping": ("lr_scheduler_kwargs: min_lr", ["lr_scheduler_kwargs", "a mapping"]),
    "adapter alone": ("num_experts: 0", ["run.yaml:8: num_experts", "0"]),
    "adapter combination": ("selection: top_k\ntop_k: 99", ["run.yaml:9: top_k", "99"]),
    "adapter against its preset": ("top_k: 2", ["run.yaml:8: top_k", "selection"]),
    "renamed in transformers": ("warmup_ratio: 0.1", ["run.yaml:8: warmup_ratio", "`warmup_steps: 0.1`"]),
    "renamed from TRL": ("lora_r: 4", ["run.yaml:8: lora_r", "`r`"]),
    "base model's loss": ("router_aux_loss_coef: 0.1", ["router_aux_loss_coef", "load_balancing"]),
    "packing": ("packing: true", ["run.yaml:8: packing", "molora tokenises the datasets itself"]),
    "secret": ("hub_token: abc", ["hub_token", "HF_TOKEN"]),
    "old and new name": (
        "activation_checkpointing: true\ngradient_checkpointing: true",
        ["run.yaml:9: gradient_checkpointing", "`activation_checkpointing`"],
    ),
    "nothing to evaluate": ("eval_strategy: steps", ["run.yaml:8: eval_strategy", "eval_path"]),
    "adapter to continue": ("adapter_name_or_path: ./dat", ["run.yaml:8", "no folder './dat'", "'data'"]),
    "alias": ("exclude_modules: *proj", ["run.yaml:8", "quotes"]),
    "tag": ("run_name: !!python/name:os.system x", ["run.yaml:8: run_name", "tag", "not supported"]),
    "contains itself": ("lr_scheduler_kwargs: &a {b: *a}", ["run.yaml:8: lr_scheduler_kwargs.b", "contains itself"]),
    "control character": ("run_name: a\x07", ["run.yaml:8", "control character"]),
    "tab": ("lr_scheduler_kwargs:\n\ta: 1", ["run.yaml:9", "tab", "spaces"]),
    "unclosed bracket": ("exclude_modules: [a, b\nseed: 1", ["run.yaml:9", "not valid YAML"]),
    "second document": ("---\nseed: 1", ["run.yaml:8", "second document"]),
}


@pytest.mark.parametrize(("lines", "fragments"), BROKEN.values(), ids=BROKEN)
def test_mistake_is_reported_with_its_line(lines: str, fragments: list[str]) -> None:
    (problem,) = problems(GOOD + lines + "\n")
    assert [fragment for fragment in fragments if fragment not in problem] == [], problem


# Name: what replaces line 5, `  - path: data/train.jsonl`.
BROKEN_DATASETS = {
    "missing file": ("  - path: data/trian.jsonl", ["run.yaml:5: datasets.0.path", "Did you mean 'train.jsonl'"]),
    "missing folder": ("  - path: dta/train.jsonl", ["run.yaml:5: datasets.0.path", "no folder", "dta"]),
    "home of nobody": ("  - path: ~no-such-user/a.jsonl", ["run.yaml:5: datasets.0.path", "no folder"]),
    "unknown key": ("  - path: data/train.jsonl\n    tsk: a", ["run.yaml:6: datasets.0.tsk", "Did you mean 'task'"]),
    "renamed key": ("  - path: data/train.jsonl\n    subset: a", ["run.yaml:6: datasets.0.subset", "`name`"]),
    "weight": ("  - path: data/train.jsonl\n    weight: 0", ["run.yaml:6: datasets.0.weight", "above 0"]),
    "samples": ("  - path: data/train.jsonl\n    max_samples: 0", ["datasets.0.max_samples", "at least 1"]),
    "no path": ("  - split: train", ["run.yaml:5: datasets.0.path", "is missing"]),
    "entry without key": ("  - data/train.jsonl\n  - path: b", ["run.yaml:5: datasets.0", "`- path: …`"]),
    "configuration of a file": ("  - path: data/train.jsonl\n    name: en", ["datasets.0.name", "hub dataset"]),
    "split of a file": ("  - path: data/train.jsonl\n    eval_split: test", ["datasets.0.eval_split", "`eval_path`"]),
    "unused": ("  - path: data/train.jsonl\n    eval_max_samples: 9", ["datasets.0.eval_max_samples", "no effect"]),
}


@pytest.mark.parametrize(("line", "fragments"), BROKEN_DATASETS.values(), ids=BROKEN_DATASETS)
def test_mistake_in_a_dataset_is_reported_with_its_line(line: str, fragments: list[str]) -> None:
    (problem,) = problems(GOOD.replace("  - path: data/train.jsonl", line))
    assert [fragment for fragment in fragments if fragment not in problem] == [], problem


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"", "is empty"),
        (b"# nothing\n", "is empty"),
        (b"- a\n- b\n", "run.yaml:1: must consist of"),
        (b"text", "run.yaml:1: must consist of"),
        (b"a: 1\nb: \xff\n", "run.yaml:2: is not UTF-8"),
        (GOOD.encode("utf-16"), "is not UTF-8"),
    ],
)
def test_file_that_is_no_mapping(content: bytes, fragment: str) -> None:
    Path("run.yaml").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_run_file("run.yaml")
    (problem,) = caught.value.problems
    assert fragment in str(problem)


def test_missing_file_and_folder() -> None:
    Path("run.yaml").write_text(GOOD)
    with pytest.raises(ConfigError, match=r"rum\.yaml: no such file. Did you mean 'run.yaml'"):
        load_run_file("rum.yaml")
    with pytest.raises(ConfigError, match="is a folder"):
        load_run_file("data")
    with pytest.raises(ConfigError, match="no folder 'nowhere'"):
        load_run_file("nowhere/run.yaml")


def test_all_mistakes_are_reported_together_in_line_order() -> None:
    text = """\
model_name_or_path: ./missing
dtype: fp32
preset: adamol
datasets:
  - path: data/nothing.jsonl
    weigth: 2
learning_rate: high
learning_rate: 1e-4
"""
    found = problems(text, "--max_stepz", "3", "seed=-1")
    places = [problem.split(": ")[0] + " " + problem.split(": ")[1] for problem in found]
    assert places == [
        "run.yaml output_dir",
        "run.yaml:1 model_name_or_path",
        "run.yaml:2 dtype",
        "run.yaml:3 preset",
        "run.yaml:5 datasets.0.path",
        "run.yaml:6 datasets.0.weigth",
        "run.yaml:7 learning_rate",
        "run.yaml:8 learning_rate",
        "command line max_stepz",
        "command line seed",
    ]


def test_adapter_mistakes_join_those_of_other_groups() -> None:
    found = problems(GOOD + "selection: top_k\ntop_k: 99\nseed: x\n")
    assert [problem.split(": ")[1] for problem in found] == ["top_k", "seed"]


def test_adapter_is_not_judged_while_one_of_its_values_is_unknown() -> None:
    """With `num_experts` unread, `top_k: 12` must not be compared with the default number of experts."""
    (problem,) = problems(GOOD + 'selection: top_k\ntop_k: 12\nnum_experts: "16"\n')
    assert "num_experts" in problem
    (problem,) = problems(GOOD + "selection: top_k\ntop_k: 12\nnum_expert: 16\n")
    assert "num_expert" in problem


def test_missing_required_keys() -> None:
    found = problems("seed: 1\n")
    assert [problem.split(": ")[1] for problem in found] == ["model_name_or_path", "datasets", "output_dir"]
    (problem,) = problems(GOOD.split("datasets")[0] + "output_dir: out\ndatasets: []\n")
    assert "run.yaml:5: datasets: is empty" in problem


def test_mistake_that_comes_from_the_preset_points_at_it() -> None:
    found = problems(GOOD + "router: static\n")
    assert all(problem.startswith("run.yaml:2: preset: ") for problem in found)
    assert "selection" in found[0]


def test_good_file(folder: Path) -> None:
    run = load(GOOD + "learning_rate: 1e-3\nmax_steps: 100\nr: 2\nbf16: false\neval_max_new_tokens: 8\n")
    assert run.model.model_name_or_path == "smollm2-135m-instruct"
    assert run.model.dtype == "auto"
    assert run.adapter == MoLoraConfig.from_preset("adamole", r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    assert run.training == {"output_dir": "out", "learning_rate": 1e-3, "max_steps": 100, "bf16": False}
    assert run.datasets[0].path == str(folder / "data" / "train.jsonl")
    assert run.datasets[0].task == "sentiment"
    assert run.evaluation.eval_max_new_tokens == 8
    assert not run.overwrite
    assert run.where("max_steps") == "run.yaml:9"
    assert run.where("datasets.0.task") == "run.yaml:6"
    assert run.where("seed") == "run.yaml"
    assert "run.yaml:3: target_modules: none." in str(run.error("target_modules", "none."))


@pytest.mark.parametrize(
    ("text", "value"), [("1e-4", 1e-4), ("1E3", 1e3), (".5", 0.5), ("2", 2), ("+1.5e+0", 1.5), ("3.", 3.0)]
)
def test_yaml_1_2_numbers(text: str, value: float) -> None:
    assert load(GOOD + f"learning_rate: {text}\n").training["learning_rate"] == value


@pytest.mark.parametrize("text", ["on", "yes", "2020-01-01", "1:30", "1_000", "0b1", "'7'", "!!str 7"])
def test_what_yaml_1_1_would_convert_is_text(text: str) -> None:
    assert load(GOOD + f"run_name: {text}\n").training["run_name"] == text.strip("'").removeprefix("!!str ")


def test_merge_keys_and_anchors() -> None:
    text = GOOD.replace("  - path", "  - &first\n    path").replace(
        "output_dir", "  - {<<: *first, task: other, max_samples: 3}\noutput_dir"
    )
    run = load(text)
    assert [dataset.task for dataset in run.datasets] == ["sentiment", "other"]
    assert run.datasets[0].path == run.datasets[1].path
    assert run.where("datasets.1.path") == "run.yaml:6"


def test_paths_start_at_the_run_file_but_on_the_command_line_at_the_current_folder(folder: Path) -> None:
    (folder / "sub").mkdir()
    path = folder / "sub" / "run.yaml"
    path.write_text(GOOD.replace("data/train", "../data/train"))
    run = load_run_file("sub/run.yaml", ["datasets.0.eval_path=data/test.jsonl"])
    assert run.datasets[0].path == str(folder / "data" / "train.jsonl")
    assert run.datasets[0].eval_path == str(folder / "data" / "test.jsonl")
    assert run.where("datasets.0.eval_path") == "command line"


@pytest.mark.parametrize("name", ["imdb", "org/name", "org/name-v1.0"])
def test_hub_ids_are_left_alone(name: str) -> None:
    run = load(GOOD.replace("data/train.jsonl", name), "datasets.0.name=en")
    assert run.datasets[0].path == name


@pytest.mark.parametrize(
    ("line", "tokens"),
    [
        ("learning_rate: 1e-4", ["--learning_rate", "1e-4"]),
        ("learning_rate: 1e-4", ["--learning-rate=1e-4"]),
        ("learning_rate: 1e-4", ["learning_rate=1e-4"]),
        ("max_steps: -1", ["--max-steps", "-1"]),
        ("exclude_modules: [q_proj, v_proj]", ["exclude_modules=[q_proj, v_proj]"]),
        ("exclude_modules: .*q_proj", ["--exclude_modules", ".*q_proj"]),
        ("overwrite: true", ["--overwrite"]),
        ("overwrite: true\nr: 8", ["--overwrite", "r=8"]),
        ("overwrite: true\nr: 8", ["--overwrite", "--r", "8"]),
        ("overwrite: false", ["--overwrite", "false"]),
        ("routing_losses: {load_balancing: 0.5}", ["routing_losses.load_balancing=0.5"]),
        ("rank_pattern: {'0': 2}", ["rank_pattern.0=2"]),
        ("alpha_pattern: {q-proj: 2}", ["alpha_pattern.q-proj=2"]),
        ("max_length: null", ["max_length=null"]),
        ("max_length:", ["max_length="]),
        ("resume_from_checkpoint: true", ["--resume-from-checkpoint"]),
        ("debug: underflow_overflow", ["debug=underflow_overflow"]),
    ],
)
def test_a_value_means_the_same_in_the_file_and_on_the_command_line(line: str, tokens: list[str]) -> None:
    assert load(GOOD + line + "\n") == load(GOOD, *tokens)


def test_override_replaces_even_a_broken_value_of_the_file() -> None:
    run = load(GOOD + "max_steps: x\n", "max_steps=3", "datasets.0.max_samples=5", "preset=mole")
    assert run.training["max_steps"] == 3
    assert run.datasets[0].max_samples == 5
    assert run.adapter.selection == "top_k"
    assert run.where("max_steps") == "command line"
    assert run.where("datasets.0.task") == "run.yaml:6"


BROKEN_OVERRIDES = {
    "unknown key": (["--learning_rte", "1"], "command line: learning_rte: unknown key. Did you mean 'learning_rate'"),
    "abbreviation": (["--learning", "1"], "command line: learning: unknown key"),
    "type": (["--max_steps=ten"], "command line: max_steps: got 'ten'; must be -1, or a whole number"),
    "no value": (["--learning_rate"], "command line: learning_rate: needs a value"),
    "stray word": (["seven"], "command line: unexpected 'seven'"),
    "single dash": (["-r", "--seed", "2"], "command line: unexpected '-r'"),
    "twice": (["r=2", "--r", "3"], "command line: r: given twice on the command line"),
    "no such entry": (["datasets.1.weight=2"], "`datasets` has 1 entries, numbered from 0; there is no 1"),
    "no number": (["datasets.first.weight=2"], "there is no 'first'"),
    "inside a scalar": (["output_dir.x=2"], "`output_dir` is a single value"),
    "no YAML": (["exclude_modules=[a"], "command line: exclude_modules: cannot read '[a'"),
    "missing file": (["datasets.0.path=data/tes.jsonl"], "command line: datasets.0.path: there is no file"),
    "duplicate inside": (["rank_pattern={a: 1, a: 2}"], "command line: rank_pattern.a: given twice"),
}


@pytest.mark.parametrize(("tokens", "fragment"), BROKEN_OVERRIDES.values(), ids=BROKEN_OVERRIDES)
def test_mistake_on_the_command_line(tokens: list[str], fragment: str) -> None:
    (problem,) = problems(GOOD, *tokens)
    assert fragment in problem


def test_resolved_is_a_run_file_of_the_same_run() -> None:
    text = GOOD.replace("all-linear", "[v_proj, q_proj]") + "learning_rate: 1e-5\nselection: top_k\ntop_k: 3\n"
    run = load(text)
    assert load(yaml.safe_dump(run.resolved())) == run


def test_sft_config_takes_the_given_fields_and_extras() -> None:
    run = load(
        GOOD + "learning_rate: 1e-3\ngradient_checkpointing: false\nwarmup_steps: 0.1\ntrust_remote_code: true\n"
    )
    config = run.sft_config(use_cpu=True, max_steps=7)
    assert (config.learning_rate, config.max_steps, config.warmup_steps) == (1e-3, 7, 0.1)
    assert config.activation_checkpointing is False
    assert config.trust_remote_code
    assert config.output_dir == "out"


@pytest.mark.filterwarnings("error::FutureWarning")
def test_sft_config_does_not_warn_of_names_the_user_did_not_choose() -> None:
    assert load(GOOD).sft_config(use_cpu=True).activation_checkpointing
    assert load(GOOD + "gradient_checkpointing: true\n").sft_config(use_cpu=True).activation_checkpointing


@pytest.mark.parametrize(
    ("lines", "fragment"),
    [
        ("seed: 1\nbf16: true\nfp16: true", "run.yaml:10: fp16: At most one of fp16 and bf16"),
        ("save_strategy: epoch\nload_best_model_at_end: true", "run.yaml:9: load_best_model_at_end: "),
        ("seed: 1\nlogging_steps: 2.5", "run.yaml:9: logging_steps: logging_steps must be an integer"),
        ("accelerator_config: {split_batch: true}", "split_batch"),
    ],
)
def test_combination_refused_by_sft_config_points_at_its_line(lines: str, fragment: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(GOOD + lines + "\n").sft_config(use_cpu=True)
    assert fragment in str(caught.value)


def test_check_output_dir(folder: Path) -> None:
    check_output_dir(load(GOOD))
    (folder / "out").mkdir()
    check_output_dir(load(GOOD))
    (folder / "out" / "weights").write_text("")
    with pytest.raises(ConfigError, match=r"run\.yaml:7: output_dir: .*nothing is overwritten"):
        check_output_dir(load(GOOD))
    check_output_dir(load(GOOD, "--overwrite"))
    with pytest.raises(ConfigError, match="command line: resume_from_checkpoint: there is no checkpoint"):
        check_output_dir(load(GOOD, "--resume_from_checkpoint"))
    with pytest.raises(ConfigError, match="there is no folder 'out/checkpoint-2'"):
        check_output_dir(load(GOOD, "resume_from_checkpoint=out/checkpoint-2"))
    checkpoint = folder / "out" / "checkpoint-1"
    checkpoint.mkdir()
    with pytest.raises(ConfigError, match="there is no whole checkpoint in 'out'"):
        check_output_dir(load(GOOD, "--resume_from_checkpoint"))
    (checkpoint / "trainer_state.json").write_text('{"global_step": 1}')
    (checkpoint / "adapter_model.bin").write_bytes(b"PK\5\6" + bytes(18))  # an empty zip
    check_output_dir(load(GOOD, "--resume_from_checkpoint"))
    check_output_dir(load(GOOD, "resume_from_checkpoint=out/checkpoint-1"))
    with pytest.raises(ConfigError, match="is a file; name a folder"):
        check_output_dir(load(GOOD, "output_dir=run.yaml", "--overwrite"))


def test_tables_name_no_key_that_works_and_refuse_only_what_exists() -> None:
    from trl import SFTConfig

    known = {entry.name for entry in (*dataclasses.fields(SFTConfig), *MoLoraConfig.user_fields())}
    assert not known & set(RENAMED)
    assert not set(RENAMED) & set(top_level_keys())
    assert not set(RENAMED_IN_DATASETS) & set(dataset_keys())
    assert set(REFUSED) <= known


def test_every_field_of_the_trainer_and_the_adapter_is_a_key_or_refused() -> None:
    from trl import SFTConfig

    fields = {entry.name for entry in dataclasses.fields(SFTConfig) if entry.init}
    fields |= {entry.name for entry in MoLoraConfig.user_fields()}
    assert fields == (fields & set(top_level_keys())) | (fields & set(REFUSED))


def test_json_schema() -> None:
    schema = json.loads(json.dumps(json_schema()))
    assert schema["$schema"].endswith("2020-12/schema")
    assert schema["additionalProperties"] is False
    assert set(schema["required"]) == {"model_name_or_path", "output_dir", "datasets"}
    assert set(schema["properties"]) == set(top_level_keys())
    assert [name for name, entry in schema["properties"].items() if "description" not in entry] == []
    assert schema["properties"]["dtype"]["enum"] == ["auto", "float32", "bfloat16", "float16"]
    assert schema["properties"]["gradient_accumulation_steps"]["minimum"] == 1
    entry = schema["properties"]["datasets"]["items"]
    assert entry["required"] == ["path"]
    assert entry["additionalProperties"] is False
