"""The nearest LoRA of a mixture, end to end on a tiny model: fitted as asked for, measured, and said what it costs."""

from __future__ import annotations

import json
from pathlib import Path

import exporting
import methods
import pytest
import tiny
import torch
import yaml
from exporting import WORDS, logits_of
from peft import PeftConfig
from safetensors.torch import load_file

import molora_cli
from molora import MoloraError
from molora.export.job import export_adapter
from molora.export.source import load_source, read_rows_for

adapter, base, data = exporting.adapter, exporting.base, exporting.data

QUICK = {"evaluate": False}


def test_the_nearest_lora_is_measured_and_the_report_says_so(base, adapter, data, tmp_path):
    source, out = adapter("adamole"), tmp_path / "out"
    report = export_adapter(source, out, target="lora", calibrate=(data,), score=(data,))
    saved = json.loads((out / "molora_export.json").read_text())
    quality = saved["quality"]
    assert list(quality) == ["base", "routed", "uniform", "usage", "calibrated"]
    assert quality["calibrated"]["output_error"] < quality["usage"]["output_error"] < 1
    assert 0 < quality["calibrated"]["kl"] < quality["base"]["kl"]
    assert {score["task"] for score in quality["routed"]["scores"]} == set(WORDS)
    assert report.quality["calibrated"].kl == quality["calibrated"]["kl"]
    assert all(sum(linear["errors"].values()) > 0 for linear in saved["linears"])
    card = (out / "README.md").read_text()
    for name in ("routed", "usage", "calibrated"):
        assert f"| {name} |" in card
    assert f"{quality['calibrated']['kl']:.4f}" in card
    assert str(base) not in card.split("---")[1], "a folder on this disk is no base model on the hub"


@pytest.mark.parametrize("method", ["uniform", "usage", "calibrated", "distilled"])
def test_the_chosen_method_is_what_is_written(method, base, adapter, data, tmp_path):
    source = adapter("adamole")
    options = {"calibrate": (data,), "method": method, "distill_steps": 2, **QUICK}
    report = export_adapter(source, tmp_path / "out", target="lora", **options)
    assert report.method == method
    assert method in report.quality
    config = PeftConfig.from_pretrained(tmp_path / "out")
    assert (config.r, config.lora_alpha) == (report.rank, report.rank)


def test_distilling_brings_a_lora_nearer(adapter, data, tmp_path):
    options = {"calibrate": (data,), "method": "distilled", "distill_steps": 30, "distill_learning_rate": 3e-3}
    report = export_adapter(adapter("adamole"), tmp_path / "out", target="lora", **options, **QUICK)
    assert report.quality["distilled"].kl < 0.9 * report.quality["calibrated"].kl


@pytest.mark.parametrize("options", [{}, {"joint": True}, {"bias": True}, {"rank": 3}, {"rank": 3, "method": "usage"}])
def test_options_of_the_fit_reach_what_is_written(options, base, adapter, data, tmp_path):
    export_adapter(adapter("adamole"), tmp_path / "out", target="lora", calibrate=(data,), **options, **QUICK)
    tensors = load_file(tmp_path / "out/adapter_model.safetensors")
    assert {len(value) for name, value in tensors.items() if ".lora_A." in name} == {options.get("rank", 16)}
    assert any(name.endswith("lora_B.bias") for name in tensors) == options.get("bias", False)
    assert logits_of(base, tmp_path / "out").isfinite().all()


def test_a_routed_mixture_becomes_a_lora_for_each_task_of_the_data(adapter, data, tmp_path):
    report = export_adapter(adapter("adamole"), tmp_path / "out", target="tasks", calibrate=(data,))
    assert {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()} == set(WORDS)
    for task in WORDS:
        assert report.quality[task].kl < report.quality[f"{task}: base"].kl


def test_the_command_line_trains_exports_and_says_what_it_costs(base, tmp_path, monkeypatch, capsys, data):
    """`--calibrate` without a file takes the data of the run."""
    monkeypatch.chdir(tmp_path)
    content = {
        "model_name_or_path": str(base),
        "preset": "adamole",
        "num_experts": 4,
        "datasets": [{"path": data, "eval_path": data, "eval_max_samples": 8}],
        "output_dir": "run",
        "max_steps": 2,
        "learning_rate": 0.02,
        "bf16": False,
        "eval_max_new_tokens": 4,
        "disable_tqdm": True,
        "evaluate_tasks": False,
    }
    Path("run.yaml").write_text(yaml.safe_dump(content))
    assert molora_cli.main(["train", "run.yaml"]) == 0
    capsys.readouterr()
    assert molora_cli.main(["export", "run", "lora", "--as", "lora"]) == 2
    assert "--calibrate" in capsys.readouterr().err
    assert molora_cli.main(["export", "run", "lora", "--as", "lora", "--calibrate", "--rank", "8"]) == 0
    printed = capsys.readouterr().out
    for words in ("What the export costs", "calibrated", "What lower ranks would keep", "Written to lora"):
        assert words in printed
    assert molora_cli.main(["merge", "run", "dense", "--calibrate", "--no-evaluate"]) == 0
    torch.testing.assert_close(logits_of(Path("dense")).isfinite().all(), torch.tensor(True))
    assert molora_cli.main(["export", "run", "lora", "--as", "lora", "--calibrate"]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err


def test_an_adapted_output_layer_is_fitted_to_all_tokens(base, adapter, data, tmp_path):
    source = adapter("adamole", target_modules=("lm_head", "q_proj"))
    report = export_adapter(source, tmp_path / "out", target="lora", calibrate=(data,), **QUICK)
    assert report.quality["calibrated"].kl < 0.5 * report.quality["base"].kl


@pytest.mark.parametrize("method", ["calibrated", "distilled"])
@pytest.mark.parametrize("trained", [{"bias": "all"}, {"modules_to_save": ("lm_head",)}])
def test_what_was_trained_besides_experts_is_measured_and_kept_apart(
    trained, method, tmp_path, data, tmp_path_factory
):
    base = tmp_path / "base"
    tiny.tiny_qwen2().save_pretrained(base)
    tiny.tiny_tokenizer().save_pretrained(base)
    model = methods.build("adamole", kind="qwen2", **{k: list(v) if k != "bias" else v for k, v in trained.items()})
    for name, parameter in model.named_parameters():
        if (name.endswith("bias") and "molora" not in name) or "modules_to_save" in name:
            parameter.data += 0.05 * torch.randn(parameter.shape)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(tmp_path / "source")
    options = {"calibrate": (data,), "method": method, "distill_steps": 2, "base_model": str(base), **QUICK}
    report = export_adapter(tmp_path / "source", tmp_path / "out", target="lora", **options)
    assert report.quality[method].kl < report.quality["base"].kl
    assert "PEFT loads, and vLLM and llama.cpp refuse" in report.notes[-1]
    saved = load_file(tmp_path / "source/adapter_model.safetensors")
    written = load_file(tmp_path / "out/adapter_model.safetensors")
    others = {name for name in saved if ".molora_" not in name}
    assert others
    assert all(torch.equal(written[name], saved[name]) for name in others)
    with pytest.raises(MoloraError, match="trained more than experts"):
        export_adapter(tmp_path / "source", tmp_path / "gguf", target="gguf-lora", **options)


def test_rows_to_judge_by_are_never_among_those_that_were_fitted_to(data, adapter, tmp_path):
    """Also if a file holds them twice."""
    twice = tmp_path / "twice.jsonl"
    twice.write_text(Path(data).read_text() * 2)
    source = load_source(str(adapter("adamole")))
    rows = read_rows_for(source, (str(twice),), (), 100, 0)
    seen = {
        part: {tuple(ids) for batch in own for ids in batch["input_ids"].tolist()} for part, own in rows.parts.items()
    }
    assert sum(len(batch["input_ids"]) for batch in rows.parts["judge"]) == 4
    assert not seen["judge"] & (seen["fit"] | seen["choose"])


def test_an_exact_form_for_one_task_is_compared_on_rows_of_that_task(base, data, tmp_path, tmp_path_factory):
    source = tmp_path_factory.mktemp("tasks")
    model = methods.build("polytropon", num_tasks=2)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(source)
    (source / "molora_report.json").write_text(json.dumps({"tasks": ["colour", "animal"]}))
    report = export_adapter(source, tmp_path / "out", target="lora", task=1, calibrate=(data,), score=(data,))
    assert report.quality["exact"].kl < 1e-6 < report.quality["base"].kl
    assert {score.task for score in report.quality["exact"].scores} == {"animal"}
