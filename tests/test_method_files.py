"""Every run file in configs is planned and trained as its header says, and what a method leaves loads and generates.

The commands are those of the file's own header, run in a folder that looks like the repository and holds tiny LoRAs.
"""

from __future__ import annotations

import itertools
import shlex
import subprocess
from pathlib import Path

import pytest
import tiny
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from methods import base_model
from peft import LoraConfig, get_peft_model

import molora_cli
from molora.runfile import load_run_file

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "configs" / "methods").glob("*.yaml"))
LORAS = ("sentiment", "arithmetic", "sql")
BASES = ("llama", "olmoe")
OTHERS = sorted((ROOT / "configs").glob("*.yaml"))
PROFILES = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with the repository's data and run files, two base models, and LoRAs and gates trained for no step."""
    folder = tmp_path_factory.mktemp("workspace")
    for name in ("configs", "examples"):
        (folder / name).symlink_to(ROOT / name)
    for name, model in zip(BASES, (tiny.tiny_llama(), base_model("perft")), strict=True):
        model.save_pretrained(folder / name)
        tiny.tiny_tokenizer().save_pretrained(folder / name)
    for name in LORAS:
        model = tiny.tiny_llama()
        model.name_or_path = str(folder / "llama")
        config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        get_peft_model(model, config).save_pretrained(folder / "runs/loras" / name)
        words = ["compose", folder / "runs/gates" / name, "--preset", "phatgoose-gate"]
        assert molora_cli.main([*map(str, words), "--adapter", str(folder / "runs/loras" / name)]) == 0
    return folder


@pytest.fixture
def here(workspace, tmp_path, monkeypatch):
    """A folder of the test's own with everything in the workspace; `lora` is what makes the LoRAs."""
    for name in ("configs", "examples", *BASES):
        (tmp_path / name).symlink_to(workspace / name)
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def commands(path):
    """The commands in a file's header, as lists of words."""
    header = path.read_text(encoding="utf-8").split("\n\n")[0]
    lines = "\n".join(line.removeprefix("#") for line in header.splitlines()).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith(("   molora ", "   head "))]


def shortened(content, options):
    """Overrides that make a run tiny, with two held-out rows a task; `options` may name another dataset."""
    base = "olmoe" if content["preset"] == "perft" else "llama"
    words = [f"model_name_or_path=./{base}", "max_steps=2", "max_length=96", "eval_max_new_tokens=2"]
    words += ["per_device_train_batch_size=3", "disable_tqdm=true", "logging_steps=1"]
    for index, dataset in enumerate(content["datasets"]):
        other = dict(itertools.pairwise(options)).get(f"--datasets.{index}.path")
        path = other or dataset["path"].replace("../", "")
        held_out = path if "scores" in path else path.replace(".train.", ".test.")
        words += [f"datasets.{index}.max_samples=6", f"datasets.{index}.eval_max_samples=2"]
        words += [f"datasets.{index}.eval_path={held_out}"]
    return words


def molora(*words):
    """Run a command that must succeed; what went wrong is in the captured output."""
    assert molora_cli.main(list(words)) == 0, words


def given(content):
    """Options of `generate` that the method's routing asks for."""
    options = []
    if content["preset"] in ("moelora", "mocle", "becotta", "polytropon", "polytropon-mhr"):
        options += ["--task", "arithmetic"]
    if content["preset"] in ("glider", "mor1e", "mor1e-pairs"):
        options += ["--scores", ",".join(["0.1"] * content["num_experts"])]
    return options


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_methods_file_does_what_its_header_says(path, workspace, here):
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert content["preset"] == path.stem
    if path.stem != "lora":
        for made in ("loras", "gates"):
            (here / "runs" / made).symlink_to(workspace / "runs" / made)

    *before, (_, command, *words) = commands(path)
    tiny_run = shortened(content, words)
    assert command == "train"
    for program, *earlier in before:
        if program == "molora":
            molora(*earlier, *(word for word in tiny_run if earlier[0] == "train" and "eval_" not in word))
        else:
            subprocess.run(shlex.join([program, *earlier]).replace("'>'", ">"), shell=True, check=True)
    molora("plan", *words, *tiny_run)
    molora("train", *words, *tiny_run)
    out = words[words.index("--output_dir") + 1] if "--output_dir" in words else content["output_dir"]
    molora("inspect", out)
    molora("generate", out, "--prompt", "a", "--max-new-tokens", "2", *given(content))


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: path.stem)
def test_every_other_run_file_does_what_its_header_says(path, here):
    if path.stem == "qlora":
        pytest.importorskip("bitsandbytes", reason="`make test-quantization` installs it")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    written = commands(path)
    assert {command for _, command, *_ in written} == {"train", "plan"}
    for number, (_, *words) in enumerate(written):
        molora(*words, *shortened(content, words), f"output_dir=runs/{number}")
        assert (here / f"runs/{number}/adapter_model.safetensors").is_file() == (words[0] == "train")


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_accelerate_reads_every_profile_and_a_run_takes_it_by_name(path, here):
    """What they train is tested in test_processes*.py, by as many processes as there can be."""
    kinds = {"single": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    profile = load_config_from_file(str(path))
    assert profile.distributed_type == kinds[path.stem]
    for _, command, _, *options in commands(path):
        run = load_run_file("configs/quickstart.yaml", options)
        assert (command, run.launch.accelerate_config) == ("train", path.stem)
        assert run.wants_processes
    assert len(commands(path)) == (path.stem != "single")
