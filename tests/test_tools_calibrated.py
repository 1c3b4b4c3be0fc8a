"""Tools on the folder of an adapter whose routers were calibrated: the same routing behind each, or a reason."""

from __future__ import annotations

import json
import re

import pytest
import tiny
import torch
from loras import save_lora
from methods import build, layers_of, tokens, watched
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file

from molora import ConfigError, MergeError, record_routing
from molora.calibration import calibrate_routers, needs_calibration
from molora.compose import compose, read_lora
from molora.export.job import export_adapter
from molora.export.parts import GATE_FILE
from molora.loaded import load_any, read_any_config
from molora.slim import slim_adapter

UNUSED = 1
"""The routed expert, of four, that no token selects."""

SHARED = [4, 5]
"""Experts that every token uses, behind the routed ones."""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A base model, a calibrated adapter one of whose experts is never selected, and rows."""
    folder = tmp_path_factory.mktemp("tools")
    tiny.tiny_llama().save_pretrained(folder / "base")
    tiny.tiny_tokenizer().save_pretrained(folder / "base")
    rows = [{"prompt": f"{index} and {index + 1} ", "completion": f"is {2 * index + 1}"} for index in range(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, fields in ADAPTERS.items():
        model = build("recommended", target_modules=["q_proj", "v_proj", "down_proj"], **fields)
        for layer in layers_of(model).values():
            if "default" in layer.molora_bias:
                layer.molora_bias["default"].weight.data.copy_(-10 * (torch.arange(4) == UNUSED))
        model.peft_config["default"].base_model_name_or_path = str(folder / "base")
        model.save_pretrained(folder / name)
    return folder


ADAPTERS = {
    "alone": {},
    "siblings": {"router_sharing": "input"},
    "centred": {"router_norm": "center"},
}
"""Ways to share routers and statistics, as overrides of the preset."""


def routed(base, folder):
    """Logits of a batch, and for each module with a decision of its own the experts and their weights."""
    model = PeftModel.from_pretrained(base, folder).eval()
    assert not needs_calibration(model)
    with record_routing(model) as records, torch.no_grad():
        logits = model(input_ids=tokens()).logits
    return logits, {record.layer: record.routing.weights for record in records}


EXACT = {
    "prune unused experts": ({"below": 0.0, "calibrate": True}, [0, 1, 2, 3]),
    "drop an unused expert": ({"drop": [UNUSED]}, [0, 2, 3]),
    "re-rank to the same rank": ({"rank": 2}, [0, 1, 2, 3]),
    "prune ranks that add nothing": ({"keep_energy": 1.0, "calibrate": True}, [0, 1, 2, 3]),
    "merge nothing": ({"merge_to": 4}, [0, 1, 2, 3]),
}
"""Options of `molora prune` that change nothing for an adapter like these, and the routed experts left."""


OF_EVERY_KIND = ("prune unused experts", "drop an unused expert")


@pytest.mark.parametrize(
    ("tool", "adapter"),
    [(tool, name) for tool in EXACT for name in ADAPTERS if tool in OF_EVERY_KIND or name == "alone"],
)
def test_what_pruning_leaves_is_routed_as_before(tool, adapter, root, tmp_path):
    options, left = EXACT[tool]
    calibrate = {"calibrate": (str(root / "rows.jsonl"),), "evaluate": False} if options.get("calibrate") else {}
    result = slim_adapter(root / adapter, tmp_path / "out", **{**options, **calibrate})
    before, weights_before = routed(tiny.tiny_llama(), root / adapter)
    after, weights_after = routed(tiny.tiny_llama(), tmp_path / "out")
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    for layer, weights in weights_before.items():
        assert not weights[..., UNUSED].any()
        torch.testing.assert_close(weights_after[layer], weights[..., [*left, *SHARED]], rtol=1e-4, atol=1e-5)
    if "below" in options:
        assert all(change.removed == [UNUSED] for change in result.slim.modules.values())
        assert result.slim.exact


def test_merging_averages_rows_and_offsets_and_keeps_the_statistics(root, tmp_path):
    slim_adapter(root / "alone", tmp_path / "out", merge_to=3)
    old, new = (load_file(folder / "adapter_model.safetensors") for folder in (root / "alone", tmp_path / "out"))
    groups = json.loads((tmp_path / "out/molora_slim.json").read_text())["modules"]
    checked = 0
    for module, change in groups.items():
        start = f"base_model.model.{module}.molora_router."
        for name in ("input_mean", "input_std"):
            assert torch.equal(new[start + name], old[start + name])
            assert new[start + name].dtype == torch.float32
        for place, members in enumerate(change["groups"]):
            z = torch.randn(5, old[start + "weight"].shape[1], generator=torch.Generator().manual_seed(0))
            logits = z @ old[start + "weight"][members].T + old[start + "bias"][members]
            merged = z @ new[start + "weight"][place] + new[start + "bias"][place]
            expected = logits.mean(dim=1) + torch.tensor(float(len(members))).log()
            torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)
            checked += len(members) > 1
    assert checked == len(groups)


@pytest.mark.parametrize("options", [{"merge_to": 3}, {"drop": [0]}], ids=str)
def test_a_confidence_that_fewer_experts_cannot_have_is_left_out(options, tmp_path):
    build("recommended", router_confidence=0.3).save_pretrained(tmp_path / "in")
    slim_adapter(tmp_path / "in", tmp_path / "out", **options)
    config = PeftConfig.from_pretrained(tmp_path / "out")
    assert (config.num_experts, config.router_confidence, config.router_init) == (3, None, "clusters")


@pytest.mark.parametrize("adapter", ["alone", "centred", "siblings"])
def test_exported_experts_and_their_gate_are_the_whole_mixture(adapter, root, tmp_path):
    export_adapter(root / adapter, tmp_path / "out", target="experts")
    gate = load_file(tmp_path / "out" / GATE_FILE)
    folders = [*(f"expert_{index}" for index in range(4)), "shared_expert_0", "shared_expert_1"]
    experts = [load_file(tmp_path / "out" / folder / "adapter_model.safetensors") for folder in folders]
    scale = PeftConfig.from_pretrained(tmp_path / "out/expert_0")
    scale = scale.lora_alpha / scale.r
    model = PeftModel.from_pretrained(tiny.tiny_llama(), root / adapter).eval()
    with watched(model) as seen, torch.no_grad():
        model(input_ids=tokens())
    for name, notes in seen.items():
        holder = name if f"{name}.molora_router.weight" in gate else name.replace("v_proj", "q_proj")
        router = {
            part: gate[f"{holder}.molora_router.{part}"] for part in ("weight", "bias", "input_mean", "input_std")
        }
        z = (notes.x - router["input_mean"]) / router["input_std"]
        p = (z @ router["weight"].T + router["bias"]).softmax(-1)
        best = (p + gate[f"{holder}.molora_bias.weight"]).topk(2).indices
        kept = torch.zeros_like(p).scatter(-1, best, p.gather(-1, best))
        weights = torch.cat([kept / kept.sum(-1, keepdim=True), torch.ones(*p.shape[:-1], len(SHARED))], dim=-1)
        deltas = [notes.x @ e[f"{name}.lora_A.weight"].T @ e[f"{name}.lora_B.weight"].T * scale for e in experts]
        expected = notes.base + sum(weights[..., [index]] * delta for index, delta in enumerate(deltas))
        torch.testing.assert_close(notes.y, expected, rtol=1e-4, atol=1e-5)
        assert router["input_mean"].any()


@pytest.mark.parametrize("target", ["lora", "dense", "tasks", "gguf-lora"])
def test_it_is_no_single_lora_and_that_is_said(target, root, tmp_path):
    with pytest.raises(MergeError, match="routes every token by itself"):
        export_adapter(root / "alone", tmp_path / "out", target=target)
    assert not (tmp_path / "out").exists()


def test_the_nearest_lora_is_fitted_to_the_routing_that_it_has(root, tmp_path):
    options = {"calibrate": (str(root / "rows.jsonl"),), "evaluate": False}
    report = export_adapter(root / "alone", tmp_path / "out", target="lora", **options)
    assert report.quality["calibrated"].kl < report.quality["base"].kl
    assert report.quality["calibrated"].output_error < report.quality["uniform"].output_error


def test_a_gate_that_normalises_its_input_cannot_be_imported(root, tmp_path):
    folder = save_lora(tmp_path / "lora", r=3, target_modules=["q_proj"])
    gate = compose(tiny.tiny_llama(), [folder], preset="phatgoose-gate", router_norm="standardize")
    calibrate_routers(gate, [{"input_ids": tokens()}])
    gate.save_pretrained(tmp_path / "gate")
    with pytest.raises(ConfigError) as error:
        read_lora(tmp_path / "gate")
    assert {problem.field for problem in error.value.problems} == {"router_norm"}


def test_a_gate_that_does_not_cannot_become_one_that_does(tmp_path):
    folder = save_lora(tmp_path / "lora", r=3, target_modules=["q_proj"])
    compose(tiny.tiny_llama(), [folder], preset="phatgoose-gate").save_pretrained(tmp_path / "gate")
    read_lora(tmp_path / "gate")
    with pytest.raises(ConfigError, match="reads its input as it is"):
        compose(tiny.tiny_llama(), [tmp_path / "gate"], preset="phatgoose-gate", router_norm="standardize")


def test_trained_loras_are_mixed_by_a_router_that_waits_for_data(tmp_path):
    folders = [
        save_lora(tmp_path / name, seed=seed, r=3, target_modules=["q_proj", "down_proj"])
        for seed, name in enumerate("abc")
    ]
    compose(tiny.tiny_llama(), folders, preset="recommended").save_pretrained(tmp_path / "mixture")
    model = PeftModel.from_pretrained(tiny.tiny_llama(), tmp_path / "mixture", is_trainable=True)
    assert needs_calibration(model)
    calibrate_routers(model, [{"input_ids": tokens(rows=8)}])
    model.save_pretrained(tmp_path / "calibrated")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("mixture", "calibrated"))
    changed = {re.sub(r".*\.(?=molora_)", "", name) for name in after if not torch.equal(after[name], before[name])}
    assert changed == {f"molora_router.{part}" for part in ("weight", "bias", "input_mean", "input_std")}
    routed(tiny.tiny_llama(), tmp_path / "calibrated")


def test_evaluate_and_generate_load_it_as_it_is(root):
    folder = str(root / "alone")
    model, _ = load_any(folder, read_any_config(folder), None)
    with torch.no_grad():
        got = model(input_ids=tokens()).logits
    torch.testing.assert_close(got, routed(tiny.tiny_llama(), root / "alone")[0], rtol=1e-4, atol=1e-5)
