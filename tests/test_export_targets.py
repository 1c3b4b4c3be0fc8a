"""Exports end to end on a tiny model: every target, what is read back, what is refused, and what is left behind."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import exporting
import methods
import pytest
import tiny
import torch
from exporting import logits_of
from methods import tokens
from peft import PeftConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import molora_cli
from molora import ConfigError, MergeError, MoloraError
from molora.export.job import export_adapter
from molora.export.parts import folder_names
from molora.writing import WriteError

adapter, base, data = exporting.adapter, exporting.base, exporting.data


@pytest.mark.parametrize(
    ("preset", "how", "inputs"),
    [
        ("static", {}, {}),
        ("lorahub", {}, {}),
        ("mos", {}, {}),
        ("polytropon", {"task": 1}, {"task_ids": torch.tensor([1, 1, 1])}),
    ],
)
def test_a_fixed_mixture_is_exported_exactly(preset, how, inputs, base, adapter, tmp_path):
    source = adapter(preset)
    expected = logits_of(base, source, **inputs)
    report = export_adapter(source, tmp_path / "lora", target="lora", **how)
    assert report.method == "exact"
    assert PeftConfig.from_pretrained(tmp_path / "lora").peft_type == "LORA"
    torch.testing.assert_close(logits_of(base, tmp_path / "lora"), expected, rtol=1e-4, atol=1e-5)
    export_adapter(source, tmp_path / "dense", target="dense", **how)
    torch.testing.assert_close(logits_of(tmp_path / "dense"), expected, rtol=1e-4, atol=1e-5)


def test_without_consent_a_routed_mixture_is_not_exported(adapter, tmp_path):
    for target in ("lora", "dense", "tasks", "gguf-lora"):
        with pytest.raises(MergeError, match="routes every token by itself"):
            export_adapter(adapter("adamole"), tmp_path / "out", target=target)
    assert list(tmp_path.iterdir()) == []


def test_experts_are_exported_one_by_one_and_go_round(base, adapter, tmp_path):
    """Composed again with constant weights, the experts are the mixture with those weights."""
    source = adapter("static", num_experts=3, r=2)
    export_adapter(source, tmp_path / "experts", target="experts")
    folders = sorted(path for path in (tmp_path / "experts").iterdir() if path.is_dir())
    assert [path.name for path in folders] == ["expert_0", "expert_1", "expert_2"]
    weights = torch.tensor([0.2, 0.5, -0.3])
    expected = logits_of(base, source, expert_weights=weights)
    from molora.compose import compose

    again = compose(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folders, "selma").eval()
    with torch.no_grad():
        composed = again(input_ids=tokens(), expert_weights=weights).logits
    torch.testing.assert_close(composed, expected, rtol=1e-4, atol=1e-5)


def test_shared_experts_are_exported_behind_the_others_and_go_round(base, adapter, tmp_path):
    source = adapter("recommended", num_experts=3, shared_experts=2, r=2)
    export_adapter(source, tmp_path / "experts", target="experts")
    folders = sorted(path for path in (tmp_path / "experts").iterdir() if path.is_dir())
    assert [path.name for path in folders[3:]] == ["shared_expert_0", "shared_expert_1"]
    weights = torch.tensor([0.2, 0.5, 0.3])
    expected = logits_of(base, source, expert_weights=weights)
    from molora.compose import compose

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    again = compose(model, folders, "recommended", num_experts=3).eval()
    with torch.no_grad():
        composed = again(input_ids=tokens(), expert_weights=weights).logits
    torch.testing.assert_close(composed, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("preset", "group", "names"),
    [
        ("adamole", None, ["expert_0", "expert_1", "expert_2", "expert_3"]),
        ("adamole", 3, ["experts_0-2", "expert_3"]),
        ("smora", None, ["experts_0-7", "experts_8-11"]),
        ("mixlora", None, ["expert_0", "expert_1", "expert_2", "expert_3"]),
        ("hydralora", None, ["expert_0", "expert_1", "expert_2", "expert_3"]),
    ],
)
def test_an_exported_expert_is_what_the_mixture_does_with_it_alone(preset, group, names, base, adapter, tmp_path):
    source = adapter(preset)
    export_adapter(source, tmp_path / "out", target="experts", group_size=group)
    assert {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()} == set(names)
    number = PeftConfig.from_pretrained(source).num_experts
    first = int(names[0].rpartition("-")[2]) + 1 if "-" in names[0] else 1
    weights = torch.zeros(number)
    weights[:first] = 1
    if preset != "mixlora" or first == 1:  # a sum of experts that span a block is no sum of deltas
        expected = logits_of(base, source, expert_weights=weights)
        torch.testing.assert_close(logits_of(base, tmp_path / "out" / names[0]), expected, rtol=1e-4, atol=1e-5)
    gates = load_file(tmp_path / "out/molora_gate.safetensors")
    saved = load_file(source / "adapter_model.safetensors")
    routers = {name for name in saved if "molora_A" not in name and "molora_B" not in name}
    assert routers == gates.keys()
    assert all(torch.equal(saved[name], gates[name]) for name in gates)


def test_every_task_becomes_a_lora(base, adapter, tmp_path):
    source = adapter("polytropon")
    export_adapter(source, tmp_path / "out", target="tasks")
    for task in range(3):
        expected = logits_of(base, source, task_ids=torch.tensor([task] * 3))
        written = logits_of(base, tmp_path / "out" / f"task_{task}")
        torch.testing.assert_close(written, expected, rtol=1e-4, atol=1e-5)


def test_modules_that_were_trained_whole_come_along(base, adapter, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(adapter("static", modules_to_save=("lm_head",), target_modules=("q_proj", "up_proj")), source)
    tensors = load_file(source / "adapter_model.safetensors")
    [name] = [name for name in tensors if "lm_head" in name]
    tensors[name] += 0.3 * torch.randn(tensors[name].shape)
    save_file(tensors, source / "adapter_model.safetensors", metadata={"format": "pt"})
    expected = logits_of(base, source)
    for target, read in (("lora", lambda: logits_of(base, tmp_path / "lora")), ("dense", None)):
        export_adapter(source, tmp_path / target, target=target)
        written = read() if read else logits_of(tmp_path / "dense")
        torch.testing.assert_close(written, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_a_dense_model_has_the_base_models_dtype_or_the_one_asked_for(dtype, base, adapter, tmp_path):
    export_adapter(adapter("static"), tmp_path / "out", target="dense", dtype=dtype)
    assert {value.dtype for value in load_file(tmp_path / "out/model.safetensors").values()} == {
        getattr(torch, dtype or "float32")
    }
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == (dtype or "float32")


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ({"target": "lorra"}, {"--as"}),
        ({"method": "calibrate"}, {"--method"}),
        ({"method": "usage", "joint": True}, {"--method", "--joint"}),
        ({"calibrate": (), "method": "usage", "joint": True}, {"--joint"}),
        ({"target": "gguf", "calibrate": (), "bias": True}, {"--bias"}),
        ({"group_size": 2, "rank": 0}, {"--group-size", "--rank"}),
        ({"target": "experts", "calibrate": (), "task": 1}, {"--calibrate", "--task"}),
        ({"target": "tasks", "calibrate": (), "method": "distilled", "prompt": "a"}, {"--method", "--prompt"}),
        ({"target": "gguf", "gguf_base": "/nope.gguf", "outtype": "q9"}, {"--gguf-base", "--outtype"}),
        ({"dtype": "float", "calibrate": "rows.jsonl"}, {"--dtype", "--calibrate"}),
        ({"dequantize": True, "outtype": "f16", "gguf_base": "x"}, {"--dequantize", "--outtype", "--gguf-base"}),
    ],
)
def test_contradictory_options_are_all_named_before_anything_is_loaded(options, fields, tmp_path):
    with pytest.raises(ConfigError) as caught:
        export_adapter(tmp_path / "nothing", tmp_path / "out", **options)
    assert {problem.field for problem in caught.value.problems} == fields


def test_an_output_that_exists_is_refused_before_anything_is_loaded(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(WriteError, match="nothing is overwritten"):
        export_adapter(tmp_path / "nothing", tmp_path / "out")


def test_blocks_of_experts_are_refused_whatever_is_asked_for(adapter, data, tmp_path):
    source = adapter("perft")
    with pytest.raises(MoloraError, match="no linear"):
        export_adapter(source, tmp_path / "out", target="lora", calibrate=(data,), base_model=str(moe_base(tmp_path)))
    assert not (tmp_path / "out").exists()


def moe_base(folder: Path) -> Path:
    methods.base_model("perft").save_pretrained(folder / "moe")
    tiny.tiny_tokenizer().save_pretrained(folder / "moe")
    return folder / "moe"


def damage(folder: Path, how: str) -> None:
    file = folder / "adapter_model.safetensors"
    content = file.read_bytes()
    if how == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif how == "header":
        file.write_bytes(b"\xff" * 16 + content[16:])
    elif how == "empty":
        file.write_bytes(b"")
    else:
        file.unlink()
        import pickle

        (folder / "adapter_model.bin").write_bytes(pickle.dumps({"a": 1}))


@pytest.mark.parametrize("how", ["truncated", "header", "empty", "pickled"])
def test_a_damaged_adapter_is_refused_and_nothing_is_written(how, adapter, tmp_path, capsys):
    source = tmp_path / "source"
    shutil.copytree(adapter("static"), source)
    damage(source, how)
    assert molora_cli.main(["export", str(source), str(tmp_path / "out"), "--as", "lora"]) == 2
    assert "unusable adapter" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [source]


def test_the_exported_lora_loads_where_molora_is_not_imported(base, adapter, tmp_path):
    source = adapter("static")
    expected = logits_of(base, source)
    export_adapter(source, tmp_path / "lora", target="lora")
    script = f"""
import sys, torch
sys.modules["molora"] = None  # an import fails
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained({str(tmp_path / "lora")!r}).eval()
ids = torch.tensor({tokens().tolist()})
torch.save(model(input_ids=ids).logits.detach(), {str(tmp_path / "logits.pt")!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=1e-4, atol=1e-5)


def test_an_exact_lora_that_is_cut_is_not_called_exact(base, adapter, tmp_path):
    report = export_adapter(adapter("static"), tmp_path / "out", target="lora", rank=2)
    assert report.method == "cut"
    assert "exactly a LoRA of rank 16. Cut to rank 2" in report.notes[0]
    assert "Cut to rank 2" in (tmp_path / "out/README.md").read_text()
    assert PeftConfig.from_pretrained(tmp_path / "out").r == 2


@pytest.mark.parametrize(
    ("tasks", "expected"),
    [
        (["..", "a/b", "a b"], ["task_0", "a_b", "a_b_2"]),
        (["", ".", "x"], ["task_0", "task_1", "x"]),
        (["same", "same"], ["same", "same_1"]),
    ],
)
def test_names_of_tasks_become_folders_inside_the_output_and_none_is_lost(tasks, expected):
    assert folder_names(tasks) == expected


def test_a_report_that_names_tasks_like_paths_writes_nothing_outside(adapter, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(adapter("polytropon"), source)
    (source / "molora_report.json").write_text(json.dumps({"tasks": ["..", "../../x", "a"]}))
    export_adapter(source, tmp_path / "sub" / "out", target="tasks")
    assert sorted(path.name for path in (tmp_path / "sub").iterdir()) == ["out"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "sub"]
    assert len([path for path in (tmp_path / "sub/out").iterdir() if path.is_dir()]) == 3


@pytest.mark.parametrize(
    ("preset", "said"), [("static", "the same for every task"), ("adamole", "routes every token")]
)
def test_only_what_depends_on_tasks_becomes_one_lora_each(preset, said, adapter, tmp_path):
    with pytest.raises((ConfigError, MergeError), match=said):
        export_adapter(adapter(preset), tmp_path / "out", target="tasks")


def test_fresh_experts_that_do_nothing_yet_are_exported_too(base, tmp_path, tmp_path_factory):
    source = tmp_path_factory.mktemp("fresh")
    model = methods.build("molora", init_weights=True)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(source)
    export_adapter(source, tmp_path / "out", target="experts")
    torch.testing.assert_close(logits_of(base, tmp_path / "out/expert_0"), logits_of(base))


def test_a_large_model_is_written_in_shards(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr("molora.export.dense.SHARD", "30KB")
    export_adapter(adapter("static"), tmp_path / "out", target="dense")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert logits_of(tmp_path / "out").isfinite().all()
