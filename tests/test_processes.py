"""Training in two processes: DDP computes what one process would, FSDP2 trains and saves a normal adapter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from filelock import FileLock
from peft import PeftModel
from safetensors.torch import load_file

from molora.data import load_tasks
from molora.evaluation import score_tasks
from molora.runfile import load_run_file

TESTS = Path(__file__).parent
WORKER = TESTS / "processes" / "worker.py"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The folder in which both processes left their results; made once, whichever pytest process asks first."""
    shared = "PYTEST_XDIST_WORKER" in os.environ
    root = tmp_path_factory.getbasetemp().parent if shared else tmp_path_factory.getbasetemp()
    folder, log = root / "processes", root / "processes.log"
    with FileLock(root / "processes.lock"):
        if not folder.exists():
            folder.mkdir()
            paths = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
            run = subprocess.run(
                [sys.executable, str(WORKER), str(folder)],
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
                stdout=log.open("w"),
                stderr=subprocess.STDOUT,
                timeout=600,
                check=False,
            )
            (folder / "returncode").write_text(str(run.returncode))
    assert (folder / "returncode").read_text() == "0", log.read_text()[-3000:]
    return folder


def read(folder, name):
    """What the first and the second process kept, and one process alone."""
    files = [folder / f"{name}-{rank}.pt" for rank in (0, 1, "alone")]
    return [torch.load(file, weights_only=True) if file.exists() else None for file in files]


def assert_same(got, expected, **tolerance):
    assert got.keys() == expected.keys() != set()
    for name in expected:
        torch.testing.assert_close(
            got[name], expected[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance
        )


GRADIENTS = (
    "task loss",
    "load balancing",
    "balancing over all processes",
    "balancing over all processes, accumulation",
    "checkpointing",
    "idle experts",
    "idle experts, checkpointing",
    "accumulation",
    "router learns by its loss alone",
    "experts of a block",
    "one router",
    "shared pools",
)


@pytest.mark.parametrize("case", GRADIENTS)
def test_ddp_gradients_are_those_of_one_process_with_all_rows(case, results):
    first, second, alone = read(results, f"gradients {case}")
    assert_same(first["gradients"], alone["gradients"], rtol=1e-4, atol=1e-6)
    assert_same(first["gradients"], second["gradients"], rtol=0, atol=0)
    assert any(gradient.abs().max() > 1e-4 for gradient in alone["gradients"].values())


def test_the_losses_matter_to_those_gradients(results):
    """Else the comparison above would not see a routing loss that is summed over processes."""
    _, _, without = read(results, "gradients task loss")
    _, _, with_loss = read(results, "gradients load balancing")
    routers = [name for name in without["gradients"] if "molora_router" in name]
    assert any((without["gradients"][n] - with_loss["gradients"][n]).abs().max() > 1e-4 for n in routers)


def test_an_expert_without_a_token_on_one_process_gets_a_gradient_all_the_same(results):
    assert all(kept["idle"] for kept in read(results, "gradients idle experts")[:2])


def test_biases_and_schedules_stay_the_same_on_all_processes(results):
    first, second, alone = read(results, "straight")
    assert_same(first["values"], second["values"], rtol=0, atol=0)
    assert first["temperature"] == second["temperature"] == alone["temperature"] == 1.0


def test_biases_move_by_the_counts_of_all_processes(results):
    first, _, alone = read(results, "straight")
    biases = {name: value for name, value in first["values"].items() if "molora_bias" in name}
    assert any(value.abs().max() > 0 for value in biases.values())
    assert_same(biases, {name: alone["values"][name] for name in biases}, rtol=0, atol=1e-7)


def test_a_checkpoint_of_two_processes_resumes_exactly_in_two(results):
    straight, resumed = read(results, "straight"), read(results, "resumed")
    for before, after in zip(straight, resumed, strict=True):
        assert_same(after["values"], before["values"], rtol=0, atol=0)


def test_a_checkpoint_of_two_processes_resumes_in_one(results):
    straight, resumed = read(results, "straight")[0], read(results, "resumed by one")[2]
    assert_same(resumed["values"], straight["values"], rtol=1e-3, atol=1e-5)


PRESETS = (
    *("adamole", "smora", "mixlora", "flylora", "hydralora", "mos"),
    *("polytropon-mhr", "x-lora", "glider", "becotta"),
)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_shared_out_model_computes_what_the_whole_one_does(preset, results):
    for kept in read(results, f"output {preset}")[:2]:
        assert kept["held"] == {True}, "every parameter is shared out"
        (expected, gradients), (got, shared_gradients) = kept["expected"], kept["got"]
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
        # FSDP averages over the processes, which here see the same rows.
        assert_same(shared_gradients, gradients, rtol=1e-4, atol=1e-5)


def test_a_shared_out_model_learns(results):
    first, second, _ = read(results, "sharded")
    assert first["losses"] == second["losses"]
    assert first["losses"][-1] < first["losses"][0] - 0.2


def test_training_a_shared_out_model_leaves_a_normal_adapter(results):
    kept, _, _ = read(results, "sharded")
    saved = load_file(results / "sharded" / "adapter_model.safetensors")
    assert {name.replace(".default", "") for name in kept["values"]} == set(saved)
    model = PeftModel.from_pretrained(tiny.tiny_llama(), results / "sharded").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**kept["given"]).logits, kept["logits"], rtol=0, atol=1e-6)
    assert torch.equal(model.generate(**kept["given"], max_new_tokens=4, do_sample=False), kept["answer"])


def test_training_a_shared_out_model_resumes_exactly(results):
    for before, after in zip(read(results, "sharded")[:2], read(results, "sharded resumed")[:2], strict=True):
        assert_same(after["values"], before["values"], rtol=0, atol=0)


def test_the_command_scores_a_shared_out_model_before_and_after(results):
    tokenizer, tasks = tiny.tiny_tokenizer(), load_tasks(load_run_file(results / "command" / "run.yaml").datasets, 42)
    report = json.loads((results / "command" / "out" / "molora_report.json").read_text())
    model = PeftModel.from_pretrained(tiny.tiny_llama(), results / "command" / "out").eval()
    after = score_tasks(model, tokenizer, tasks, progress=False)
    with model.disable_adapter():
        before = score_tasks(model, tokenizer, tasks, progress=False)
    for name, scores in (("before", before), ("after", after)):
        assert [entry["value"] for entry in report[name]] == pytest.approx([score.value for score in scores], rel=1e-4)
    assert after[0].value < 0.8 * before[0].value, "perplexity"


def test_the_command_prints_once(results):
    first, second, _ = read(results, "command")
    assert first["printed"].count("The adapter is in") == 1
    assert not second["printed"].strip()
