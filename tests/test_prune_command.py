"""`molora prune`: from folder to folder, with a report; what cannot be done is said before anything is loaded."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from slimming import build
from tiny import tiny_llama, tiny_tokenizer

from molora import ConfigError, DataError
from molora.adapters import read_adapter_config
from molora.commands.prune import run
from molora.quantization import RUN_FILE
from molora.report import REPORT_FILE
from molora.slim import SLIM_FILE, slim_adapter
from molora.writing import WriteError

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "and", "runs", "away", "from", "it"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, an adapter as training leaves it, and rows."""
    folder = tmp_path_factory.mktemp("prune")
    tiny_llama().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    rows = [{"prompt": " ".join(WORDS[at % 9 : at % 9 + 3]) + " ", "completion": WORDS[at % 14]} for at in range(20)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save(folder, "adapter", num_experts=4, r=2, selection="top_k", top_k=1, renormalize=False)
    tiny_tokenizer().save_pretrained(folder / "adapter")
    (folder / "adapter" / REPORT_FILE).write_text('{"tasks": ["rows"], "after": [1], "routing": [2]}')
    for name in ("training_args.bin", "model.gguf", "x.pkl", "README.md", "trainer_state.json"):
        (folder / "adapter" / name).write_bytes(b"of the old adapter")
    (folder / "adapter" / "checkpoint-10").mkdir()
    return folder


def save(folder: Path, name: str, preset: str = "molora", **fields: Any) -> Path:
    model = build(preset, **fields)
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / name)
    return folder / name


OPERATIONS: dict[str, dict[str, Any]] = {
    "below": {"below": 0.3},
    "never selected": {"below": 0.0},
    "keep energy": {"keep_energy": 0.8},
    "rank": {"rank": 1},
    "merge": {"merge_to": 2},
    "drop": {"drop": [1, 3]},
}


@pytest.mark.parametrize("case", OPERATIONS)
def test_the_command_writes_a_smaller_adapter_and_what_it_costs(
    case: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    before = sorted(path.name for path in (root / "adapter").iterdir())
    assert run(str(root / "adapter"), str(out), calibrate=[str(root / "rows.jsonl")], **OPERATIONS[case]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    report = json.loads((out / SLIM_FILE).read_text())
    changed = [name for name, one in report["modules"].items() if one["rank_before"] != one["rank_after"]]
    assert len(report["modules"]) == 6
    if case != "never selected":
        assert report["parameters"]["after"] < report["parameters"]["before"]
        assert f"{report['parameters']['after']:,} of {report['parameters']['before']:,} parameters" in printed
        assert changed
    quality = report["quality"]
    assert quality["tokens"] > 0
    assert math.isfinite(quality["kl"])
    assert quality["perplexity_before"] > 1
    assert "held-out tokens: KL" in printed
    assert all(one["error"] is not None for one in report["modules"].values())
    assert all(report["modules"][name]["error"] > 0 for name in changed) or case in ("below", "never selected")
    assert all(one["error"] < 1e-9 for name, one in report["modules"].items() if name not in changed)
    model = PeftModel.from_pretrained(tiny_llama(), out).eval()
    with torch.no_grad():
        assert model(input_ids=torch.arange(4, 24).reshape(2, 10)).logits.isfinite().all()
    names = {path.name for path in out.iterdir()}
    assert {REPORT_FILE, "tokenizer_config.json", "tokenizer.json"} <= names
    assert not names & {"training_args.bin", "checkpoint-10", "model.gguf", "x.pkl", "trainer_state.json"}
    kept = json.loads((out / REPORT_FILE).read_text())
    assert kept == {"tasks": ["rows"], "before": [], "after": [], "routing": []}
    card = (out / "README.md").read_text()
    assert f"{report['parameters']['after']:,} of {report['parameters']['before']:,} parameters" in card
    assert f"KL {quality['kl']:.4g} nats" in card
    assert str(root) not in card
    assert sorted(path.name for path in (root / "adapter").iterdir()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("options", [{"rank": 1}, {"merge_to": 2}, {"drop": [0]}])
def test_without_calibration_no_base_model_is_needed(
    options: dict[str, Any], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("molora.slim.job.load_source", lambda *_, **__: pytest.fail("loads the base model"))
    result = slim_adapter(root / "adapter", tmp_path / "out", **options)
    assert result.quality is None
    assert json.loads((tmp_path / "out" / SLIM_FILE).read_text()) == result.as_json()
    config = read_adapter_config(str(tmp_path / "out"))
    assert config.num_experts == (options.get("merge_to") or 4 - len(options.get("drop", ())))


def test_a_slimmed_adapter_can_be_slimmed_again(root: Path, tmp_path: Path) -> None:
    rows = [str(root / "rows.jsonl")]
    slim_adapter(root / "adapter", tmp_path / "one", below=0.3, calibrate=rows)
    slim_adapter(tmp_path / "one", tmp_path / "two", drop=[0])
    slim_adapter(tmp_path / "two", tmp_path / "three", merge_to=2, calibrate=rows)
    result = slim_adapter(tmp_path / "three", tmp_path / "four", rank=1, calibrate=rows)
    assert result.slim.adapter.parameters() < result.before.parameters()
    PeftModel.from_pretrained(tiny_llama(), tmp_path / "four")


@pytest.mark.parametrize(
    ("name", "preset", "fields", "options"),
    [
        ("ffn", "mixlora", {"num_experts": 4}, {"below": 0.3}),
        ("biases", "molora", {"num_experts": 4, "bias": "all"}, {"rank": 1}),
        ("heads", "molora", {"num_experts": 4, "modules_to_save": ["lm_head"]}, {"merge_to": 2}),
        ("alone", "lora", {}, {"rank": 2}),
    ],
)
def test_other_kinds_of_adapters_are_measured_too(
    name: str, preset: str, fields: dict[str, Any], options: dict[str, Any], root: Path, tmp_path: Path
) -> None:
    folder = save(tmp_path, name, preset, **fields)
    rows = [str(root / "rows.jsonl")]
    result = slim_adapter(folder, tmp_path / "out", calibrate=rows, base_model=str(root / "base"), **options)
    assert result.quality is not None
    assert result.quality.kl > 0
    measured = [change.error for module, change in result.slim.modules.items() if change.error is not None]
    assert measured
    PeftModel.from_pretrained(tiny_llama(), tmp_path / "out")


def test_scores_of_dropped_experts_cannot_be_measured_and_it_says_so(root: Path, tmp_path: Path) -> None:
    folder = save(tmp_path, "scored", num_experts=3, r=2, score_weight=1.0)
    rows = [{"text": word * 3, "expert_scores": [0.1, 0.2, 0.3]} for word in WORDS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"calibrate": [str(tmp_path / "rows.jsonl")], "base_model": str(root / "base")}
    result = slim_adapter(folder, tmp_path / "out", drop=[1], **data)
    assert result.quality is None
    assert any("Nothing was measured" in note for note in result.slim.notes)
    assert slim_adapter(folder, tmp_path / "ranked", rank=1, **data).quality is not None


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        ({}, ["give one of --below, --drop, --keep-energy, --rank, --merge-to; none is given"]),
        ({"rank": 1, "drop": [0]}, ["got --drop and --rank"]),
        ({"below": 0.1}, ["--below", "give a file with --calibrate FILE"]),
        ({"keep_energy": 0.1, "rows": 3}, ["--keep-energy", "--rows: is about calibration rows"]),
        ({"drop": [7]}, ["got [7]; must be some of the experts 0 to 3"]),
        ({"rank": 0}, ["must be at least 1"]),
        ({"drop": [0], "seed": 3}, ["--seed: is about calibration rows"]),
        ({"drop": [0], "evaluate": False}, ["--no-evaluate: is about calibration rows"]),
        ({"below": 1.0, "calibrate": ["x"]}, ["--below: got 1.0; must be a share in [0, 1)"]),
        ({"keep_energy": 0.0, "calibrate": ["x"], "rows": 0}, ["--keep-energy: got 0.0", "--rows: got 0"]),
        ({"drop": [7], "calibrate": ["x"]}, ["must be some of the experts 0 to 3"]),
        ({"drop": [], "calibrate": ["x"]}, ["--drop: got []"]),
        ({"merge_to": 9, "calibrate": ["x"]}, ["must be from 1 to 4"]),
    ],
)
def test_mistakes_are_told_together_and_nothing_is_written(
    options: dict[str, Any], messages: list[str], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("molora.slim.job.load_source", lambda *_, **__: pytest.fail("loads the base model"))
    with pytest.raises(ConfigError) as error:
        run(str(root / "adapter"), str(tmp_path / "out"), **options)
    assert all(message in str(error.value) for message in messages)
    assert not list(tmp_path.iterdir())


def test_too_few_experts_for_top_k_are_refused_before_anything_is_loaded(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("molora.slim.job.load_source", lambda *_, **__: pytest.fail("loads the base model"))
    folder = save(tmp_path, "adapter", num_experts=3, selection="top_k", top_k=2)
    for options in ({"drop": [0, 2]}, {"merge_to": 1}):
        with pytest.raises(ConfigError, match="cannot select 2 of 1"):
            slim_adapter(folder, tmp_path / "out", calibrate=["x"], **options)


def test_tasks_are_scored_before_and_after_where_the_run_kept_rows(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save(tmp_path, "trained", num_experts=4, r=2)
    rows = str(root / "rows.jsonl")
    run_file = {
        **{"model_name_or_path": str(root / "base"), "output_dir": "out", "preset": "molora"},
        **{"datasets": [{"path": rows, "eval_path": rows, "eval_max_samples": 4}], "eval_max_new_tokens": 2},
    }
    (folder / RUN_FILE).write_text(json.dumps(run_file))
    how: dict[str, Any] = {"drop": [1], "calibrate": [], "base_model": str(root / "base")}
    assert run(str(folder), str(tmp_path / "out"), **how) == 0
    quality = json.loads((tmp_path / "out" / SLIM_FILE).read_text())["quality"]
    for name in ("scores_before", "scores_after"):
        found = [(one["metric"], one["count"]) for one in quality[name]]
        assert found == [("exact_match", 4), ("token_f1", 4), ("perplexity", 4)]
    assert "exact_match" in capsys.readouterr().out
    assert "| rows | exact_match | 4 |" in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / RUN_FILE).is_file()
    assert run(str(folder), str(tmp_path / "silent"), evaluate=False, **how) == 0
    quality = json.loads((tmp_path / "silent" / SLIM_FILE).read_text())["quality"]
    assert quality["scores_before"] == quality["scores_after"] == []


def test_what_an_adapter_cannot_do_is_said_before_data_is_read(root: Path, tmp_path: Path) -> None:
    folder = save(tmp_path, "shared", "hydralora")
    with pytest.raises(ConfigError, match="'shared_A'"):
        run(str(folder), str(tmp_path / "out"), below=0.1, calibrate=["nowhere.jsonl"])
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_and_bad_data_leaves_nothing(root: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(WriteError, match="nothing is overwritten"):
        run(str(root / "adapter"), str(tmp_path / "full"), rank=1)
    with pytest.raises(DataError, match="nowhere"):
        run(str(root / "adapter"), str(tmp_path / "out"), below=0.1, calibrate=[str(tmp_path / "nowhere.jsonl")])
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "adapter_config.json").write_bytes((root / "adapter" / "adapter_config.json").read_bytes())
    weights = (root / "adapter" / "adapter_model.safetensors").read_bytes()
    (tmp_path / "torn" / "adapter_model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(ConfigError, match="damaged"):
        run(str(tmp_path / "torn"), str(tmp_path / "out"), rank=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "torn"]


def test_weights_that_are_not_what_the_config_says_are_refused(root: Path, tmp_path: Path) -> None:
    (tmp_path / "odd").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "odd" / name).write_bytes((root / "adapter" / name).read_bytes())
    config = json.loads((tmp_path / "odd" / "adapter_config.json").read_text())
    (tmp_path / "odd" / "adapter_config.json").write_text(json.dumps(config | {"r": 3}))
    with pytest.raises(ValueError, match="config and weights disagree"):
        run(str(tmp_path / "odd"), str(tmp_path / "out"), rank=1)
    assert not (tmp_path / "out").exists()
