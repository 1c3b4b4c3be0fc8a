"""`molora train` in several processes: what is started, what is refused, and that it trains what one process does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import yaml
from accelerate.utils import DistributedType
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

import molora_cli
from molora import ConfigError
from molora.commands import launch
from molora.commands.train import _as_launched
from molora.runfile import load_run_file
from molora.runfile.run import accelerate_profiles


@pytest.fixture(autouse=True)
def _not_launched(monkeypatch):
    for name in launch.SET_BY_LAUNCHERS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def run_file(tmp_path, monkeypatch):
    """Write a run file and its data; return a function that writes it again with other keys."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"a colour {index}", "completion": ("red", "blue", "green")[index % 3]} for index in range(8)]
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {
        "model_name_or_path": "base",
        "preset": "adamole",
        "num_experts": 4,
        "target_modules": ["q_proj", "up_proj"],
        "datasets": [{"path": "train.jsonl", "eval_path": "test.jsonl", "task": "colour"}],
        "output_dir": "out",
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "bf16": False,
        "eval_max_new_tokens": 2,
        "disable_tqdm": True,
    }

    def write(**changes):
        (tmp_path / "run.yaml").write_text(yaml.safe_dump({**content, **changes}, sort_keys=False))
        return "run.yaml"

    (tmp_path / "base").mkdir()
    return write


@pytest.fixture
def started(monkeypatch):
    """Catch what accelerate's launcher is told, instead of starting processes."""
    caught = SimpleNamespace(arguments=None, marked=False, error=None)

    def start(arguments):
        caught.arguments, caught.marked = arguments, launch.is_launched()
        if caught.error is not None:
            raise caught.error

    monkeypatch.setattr(launch, "launch_command", start)
    return caught


def test_processes_are_started_with_the_same_words(run_file, started):
    words = ["train", run_file(), "--num_processes", "2", "--debug", "max_steps=7"]
    assert molora_cli.main(words) == 0
    assert started.arguments.training_script == "molora_cli"
    assert started.arguments.module
    assert started.arguments.training_script_args == words
    assert started.arguments.num_processes == 2
    assert started.arguments.config_file == str(accelerate_profiles()["ddp"])
    assert started.marked
    assert not launch.is_launched(), "the mark is taken off again"


def test_a_file_of_accelerate_config_is_used_as_it_is(run_file, started, tmp_path):
    profile = yaml.safe_load(accelerate_profiles()["ddp"].read_text())
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**profile, "num_processes": 3}))
    assert molora_cli.main(["train", run_file(accelerate_config="mine.yaml")]) == 0
    assert started.arguments.config_file == "mine.yaml"
    assert started.arguments.num_processes is None, "the file says how many"


@pytest.mark.parametrize("keys", [{}, {"num_processes": 1}, {"accelerate_config": "single"}, {"num_processes": None}])
def test_one_process_starts_no_other(keys, run_file, started, monkeypatch):
    ran = []
    monkeypatch.setattr("molora.commands.train.run", lambda run: ran.append(run) or 0)
    assert molora_cli.main(["train", run_file(**keys)]) == 0
    assert started.arguments is None
    assert len(ran) == 1


@pytest.mark.parametrize("name", ["LOCAL_RANK", "ACCELERATE_MIXED_PRECISION", launch.LAUNCHED])
def test_a_launched_process_starts_no_other(name, run_file, started, monkeypatch):
    ran = []
    monkeypatch.setattr("molora.commands.train.run", lambda run: ran.append(run) or 0)
    monkeypatch.setenv(name, "1")
    assert molora_cli.main(["train", run_file(num_processes=2)]) == 0
    assert started.arguments is None
    assert len(ran) == 1


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"accelerate_config": "fdsp2"}, "run.yaml:{line}: accelerate_config: got 'fdsp2'"),
        ({"accelerate_config": "fdsp2"}, "Did you mean 'fsdp2'"),
        ({"accelerate_config": "./mine.yaml"}, "there is no file './mine.yaml'"),
        ({"num_processes": 0}, "run.yaml:{line}: num_processes: got 0"),
        ({"num_processes": 2, "accelerate_config": "single"}, "'single' runs one process"),
        ({"num_processes": 2, "accelerate_config": "fsdp2", "use_cpu": True}, "shares a model among GPUs"),
        ({"num_processes": 2, "accelerate_config": "zero2", "use_cpu": True}, "pip install deepspeed"),
        ({"accelerate_config": "ddp", "use_cpu": True}, "set num_processes"),
        ({"num_processes": 2, "overwrite": False, "output_dir": "base/.."}, "already holds files"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_starts(keys, words, run_file, started, capsys, monkeypatch):
    find = launch.importlib.util.find_spec
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None if name == "deepspeed" else find(name))
    assert molora_cli.main(["train", run_file(**keys)]) == 2
    line = next(
        n for n, text in enumerate(Path("run.yaml").read_text().splitlines(), 1) if text.startswith(tuple(keys))
    )
    assert words.format(line=line) in capsys.readouterr().err
    assert started.arguments is None


def test_more_processes_than_gpus_are_refused(run_file, started, capsys, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert molora_cli.main(["train", run_file(num_processes=3)]) == 2
    assert "num_processes: got 3, and this machine has 2 GPUs" in capsys.readouterr().err
    assert molora_cli.main(["train", run_file(accelerate_config="ddp")]) == 0
    assert started.arguments.num_processes == 2, "one a GPU by default"


@pytest.mark.parametrize(
    ("exit_code", "code", "words"),
    [(2, 2, ""), (1, 1, ""), (130, 130, ""), (-signal.SIGKILL, 1, "SIGKILL; most often for want of memory")],
)
def test_the_exit_code_is_that_of_the_process_that_failed_first(exit_code, code, words, run_file, started, capsys):
    failure = ProcessFailure(local_rank=1, pid=1, exitcode=exit_code, error_file="none")
    started.error = ChildFailedError("molora_cli", {1: failure})
    assert molora_cli.main(["train", run_file(num_processes=2)]) == code
    printed = capsys.readouterr().err
    assert words in printed if words else not printed


def test_the_resolved_run_says_how_it_was_launched(run_file):
    resolved = load_run_file(run_file(num_processes=2, accelerate_config="multi_gpu")).resolved()
    assert (resolved["num_processes"], resolved["accelerate_config"]) == (2, "multi_gpu")


def molora(*words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, "-m", "molora_cli", *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


def test_two_processes_train_what_one_does(run_file, tmp_path):
    tiny.tiny_llama().save_pretrained(tmp_path / "base")
    tiny.tiny_tokenizer().save_pretrained(tmp_path / "base")
    run = molora("train", run_file(), "--num_processes", "2")
    assert run.returncode == 0, run.stderr[-2000:]
    for once in ("Training ", "Scores on held-out rows", "The adapter is in out"):
        assert run.stdout.count(once) == 1, run.stdout
    assert yaml.safe_load((tmp_path / "out/molora_run.yaml").read_text())["num_processes"] == 2
    alone = ["--per_device_train_batch_size", "4", "--output_dir", "alone"]
    assert molora_cli.main(["train", run_file(), *alone]) == 0
    two, one = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "alone"))
    assert two.keys() == one.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-6, msg=lambda text, name=name: name + text)
    reports = [json.loads((tmp_path / name / "molora_report.json").read_text()) for name in ("out", "alone")]
    assert reports[0]["before"] == reports[1]["before"] != []


def test_other_processes_than_asked_for_are_refused(run_file):
    state = SimpleNamespace(num_processes=2, distributed_type=DistributedType.MULTI_CPU)
    with pytest.raises(ConfigError, match="num_processes: got 3, and the launcher started 2"):
        _as_launched(load_run_file(run_file(num_processes=3)), state)


@pytest.mark.multiprocess
def test_other_processes_than_asked_for_are_refused_once(run_file, tmp_path):
    """Started by hand with torchrun, which says one thing, while the file says another."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "molora_cli"]
    run = subprocess.run(
        [sys.executable, *words, "train", run_file(num_processes=3)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert run.stderr.count("got 3, and the launcher started 2") == 1, run.stderr[-2000:]
    assert not (tmp_path / "out").exists()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("profile", ["ddp", "fsdp2", "zero2", "zero3"])
def test_two_gpus_train_save_and_resume(profile, run_file, tmp_path):
    if profile.startswith("zero"):
        pytest.importorskip("deepspeed")
    tiny.tiny_llama().save_pretrained(tmp_path / "base")
    tiny.tiny_tokenizer().save_pretrained(tmp_path / "base")
    keys = {"accelerate_config": profile, "num_processes": 2, "bf16": True, "save_strategy": "steps", "save_steps": 1}
    for words in ((), ("--max_steps", "3", "--resume_from_checkpoint")):
        run = subprocess.run(
            [sys.executable, "-m", "molora_cli", "train", run_file(**keys), *words],
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        assert run.returncode == 0, run.stderr[-2000:]
        assert run.stdout.count("Scores on held-out rows") == 1
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.isfinite(p).all() for p in model.parameters())
