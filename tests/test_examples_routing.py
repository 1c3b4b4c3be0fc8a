"""The examples about routing and export do what they say: short on a tiny model, and on the packaged one."""

from __future__ import annotations

import contextlib
import io
import math
import re
import runpy
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from example_runs import EXAMPLES, needs_packaged_model, options, start
from gguf import GGUFReader
from peft import AutoPeftModelForCausalLM, PeftConfig, get_peft_model
from reports import write_base
from safetensors.torch import load_file, save_file

import molora_cli.arguments
from molora import MoLoraConfig, record_routing
from molora.writing import WriteError

ROWS = {"contrastive_routing": 6, "continual": 6, "compose_loras": 6, "to_llama_cpp": 10}  # an export needs ten
NAMES = tuple(ROWS)
NUMBER = r"-?\d+\.\d+"
# transformers renames what TRL and PEFT still set by its older name; growing says that outputs change, as is meant.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:the new experts of 'default' share:UserWarning"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a tiny language model and its tokenizer."""
    return str(write_base(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """Runs an example once; gives what it defined, what it printed, and its folder."""
    done = {}

    def run(name):
        if name not in done:
            out = tmp_path_factory.mktemp("runs") / name
            defined, printed = defined_by(name), io.StringIO()
            with contextlib.redirect_stdout(printed):
                defined["main"](options(base, out, ROWS[name]))
            done[name] = defined, printed.getvalue(), out
        return done[name]

    return run


def defined_by(name):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def numbers_of(line):
    """What a printed line says, after its name."""
    return [float(number) for number in re.findall(rf"(?<=\s){NUMBER}(?=\s|$)", line)]


def lines_of(printed, *starts):
    """The one line that begins with each of some words."""
    found = [[line for line in printed.splitlines() if line.startswith(start)] for start in starts]
    assert [len(lines) for lines in found] == [1] * len(starts), printed
    return [lines[0] for lines in found]


def reloaded(folder):
    return AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def experts_of(folder):
    """Adapter tensors of a folder that belong to experts."""
    return {
        name: value for name, value in load_file(folder / "adapter_model.safetensors").items() if "router" not in name
    }


ADAPTERS = {
    "contrastive_routing": ["balance", "routing_contrastive", "gate_contrastive"],
    "continual": ["grown", "lora"],
    "compose_loras": ["arrow", "selma", "loras/pronunciation", "loras/sentiment", "loras/arithmetic"],
    "to_llama_cpp": ["mixture", "lora"],
}


@pytest.mark.parametrize("name", NAMES)
def test_every_adapter_that_an_example_writes_was_trained_and_loads_again(name, runs):
    out = runs(name)[2]
    for folder in ADAPTERS[name]:
        ups = [
            value for key, value in reloaded(out / folder).named_parameters() if re.search(r"lora_(frozen_)?B\b", key)
        ]
        assert ups
        assert all(value.isfinite().all() and value.any() for value in ups), folder


def test_each_arm_of_contrastive_routing_has_its_losses_and_a_line_of_figures(runs):
    defined, printed, out = runs("contrastive_routing")
    lines = lines_of(printed, "untrained", *defined["ARMS"])
    for line in lines:
        *losses, mean, bits = numbers_of(line)
        assert mean == pytest.approx(sum(losses) / len(defined["TASKS"]), abs=2e-3)
        assert 0 <= bits <= math.log2(3)
    assert len({tuple(numbers_of(line)) for line in lines}) > 1
    configs = [PeftConfig.from_pretrained(out / folder) for folder in ADAPTERS["contrastive_routing"]]
    assert [set(config.routing_losses) for config in configs] == [set(losses) for losses in defined["ARMS"].values()]
    weights = [experts_of(out / folder) for folder in ADAPTERS["contrastive_routing"]]
    for other in weights[1:]:  # the losses did something
        assert any(not torch.equal(weights[0][key], value) for key, value in other.items())


def test_bits_of_experts_are_those_counted_token_by_token(runs):
    defined = runs("contrastive_routing")[0]
    config = MoLoraConfig.from_preset("mole", num_experts=3, target_modules=["q_proj", "up_proj"])
    model = get_peft_model(tiny.tiny_llama(), config).eval()
    batches = {}
    for number, task in enumerate(defined["TASKS"]):
        ids = torch.randint(4 + 30 * number, 34 + 30 * number, (2, 6))
        mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
        labels = torch.where((torch.arange(6) > 2 + number % 2) & mask.bool(), ids, -100)
        batches[task] = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    by_linear = {}
    for task, batch in batches.items():
        with record_routing(model) as records:
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        for record in records:
            weights = record.routing.weights.detach().reshape(2, 6, 3)
            own = [weights[b, s] / weights[b, s].sum() for b, s in (batch["labels"] >= 0).nonzero().tolist()]
            by_linear.setdefault(record.layer, {})[task] = torch.stack(own).double().mean(dim=0)
    bits = []
    for of_task in by_linear.values():
        overall = sum(of_task.values()) / 3
        terms = [p * math.log2(p / q) for own in of_task.values() for p, q in zip(own, overall, strict=True) if p > 0]
        bits.append(sum(terms) / 3)
    trainer = SimpleNamespace(model=model, get_eval_dataloader=lambda task: [batches[task]])
    assert len(bits) == 4
    assert defined["bits_of_experts"](trainer) == pytest.approx(float(sum(bits) / 4), abs=1e-6)
    assert float(sum(bits)) > 1e-3


def test_continual_grows_frozen_routed_experts_and_a_lora_as_large(runs):
    defined, _, out = runs("continual")
    config = PeftConfig.from_pretrained(out / "grown")
    assert (config.num_experts, config.frozen_experts, config.freeze_router) == (6, 4, True)
    weights = experts_of(out / "grown")
    frozen = {name: value for name, value in weights.items() if "frozen_B" in name}
    assert len(frozen) == 7  # of one layer: the upper of two
    for name, old in frozen.items():
        both = torch.cat([old, weights[name.replace("frozen_", "")]], dim=1)
        assert both.shape[1] == 6 * 8
        assert all(expert.any() for expert in both.split(8, dim=1))  # each stage trained its own
    counts = [sum(value.numel() for value in experts_of(out / method).values()) for method in defined["METHODS"]]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("method", ["grown", "lora"])
def test_continual_prints_a_triangle_and_what_was_forgotten(method, runs):
    defined, printed, _ = runs("continual")
    table = printed[printed.index(f"{method}: held-out loss") :]
    rows = [numbers_of(next(line for line in table.splitlines() if line.startswith(f"after {task}")))
            for task in defined["TASKS"]]  # fmt: skip
    assert [len(row) for row in rows] == [1, 2, 3]
    assert all(math.isfinite(loss) and loss > 0 for row in rows for loss in row)
    forgot, mean = re.search(rf"{method} forgot ([+-]\d\.\d+) of pronunciation; .* is (\d\.\d+)\.", table).groups()
    assert float(forgot) == pytest.approx(rows[2][0] - rows[0][0], abs=2e-3)
    assert float(mean) == pytest.approx(sum(rows[2]) / 3, abs=2e-3)


def test_compose_mixes_plain_loras_exactly_and_leaves_them_alone(runs):
    defined, printed, out = runs("compose_loras")
    folders = [out / "loras" / task for task in defined["TASKS"]]
    assert {PeftConfig.from_pretrained(folder).peft_type.value for folder in folders} == {"LORA"}
    parts = [experts_of(folder) for folder in folders]
    for preset in defined["MIXTURES"]:
        for name, value in experts_of(out / preset).items():
            own = [part[name.replace("molora_frozen_", "lora_")] for part in parts]
            assert torch.equal(value, torch.cat(own, dim=int("_B" in name)))
    assert float(re.search(r"logits differ by (\S+) at most", printed)[1]) < 1e-5
    assert "files are as they were" in printed
    table = lines_of(printed, "base model", *(f"LoRA {task}" for task in defined["TASKS"]), "all, selma", "all, arrow")
    losses = [numbers_of(line) for line in table]
    assert all(len(row) == 4 for row in losses)
    assert all(row[3] == pytest.approx(sum(row[:3]) / 3, abs=2e-3) for row in losses)
    for number, row in enumerate(losses[1:4]):  # each LoRA learned its own task
        assert row[number] < losses[0][number]


def test_the_gguf_file_is_a_lora_of_as_many_linears_and_commands_name_it(runs):
    _, printed, out = runs("to_llama_cpp")
    reader = GGUFReader(out / "gguf/adapter.gguf")
    assert reader.fields["adapter.type"].contents() == "lora"
    pairs = len(load_file(out / "lora/adapter_model.safetensors")) // 2
    assert len(reader.tensors) == 2 * pairs == 6  # three linears of the upper of two layers
    said = re.search(rf"{pairs} pairs; 2 compared with PEFT's, B A differ by (\S+) at most", printed)
    assert float(said[1]) < 1e-6
    for tool in ("llama-cli", "llama-server"):
        command = shlex.split(lines_of(printed, f"{tool} ")[0])
        assert command[1:3] == ["-m", "BASE.gguf"]
        assert Path(command[command.index("--lora") + 1]).is_file()
    costs = [numbers_of(line) for line in lines_of(printed, "base ", "routed ", "calibrated ")]
    assert [len(row) for row in costs] == [2, 1, 3]
    assert all(math.isfinite(number) for row in costs for number in row)


def test_the_comparison_of_files_sees_one_number_that_differs(runs, tmp_path):
    defined, _, out = runs("to_llama_cpp")
    shutil.copytree(out / "lora", tmp_path / "lora")
    weights = load_file(tmp_path / "lora/adapter_model.safetensors")
    name = next(key for key in weights if "up_proj.lora_B" in key)
    weights[name][3, 0] += 1
    save_file(weights, tmp_path / "lora/adapter_model.safetensors")
    said = defined["difference"](tmp_path / "lora", out / "gguf/adapter.gguf")
    largest = weights[name.replace("lora_B", "lora_A")][0].abs().max().item()
    assert float(re.search(r"differ by (\S+) at most", said)[1]) == pytest.approx(largest, rel=0.06)


def test_an_adapter_that_is_there_is_exported_without_training(base, runs, tmp_path):
    defined, _, out = runs("to_llama_cpp")
    given = ["--adapter", str(out / "mixture"), "--data", str(defined["TRAIN"])]
    with contextlib.redirect_stdout(io.StringIO()):
        defined["main"]([*options("no such model", tmp_path / "out", ROWS["to_llama_cpp"]), *given])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["gguf", "lora"]


@pytest.mark.parametrize("name", ["contrastive_routing", "compose_loras"])
def test_the_commands_that_an_example_prints_are_commands(name, runs):
    printed = runs(name)[1]
    command = re.search(r": molora (.*)$", printed, re.MULTILINE)[1]
    molora_cli.arguments.parse(shlex.split(command))
    named = [word for word in shlex.split(command) if word.startswith("/")]
    assert len(named) >= 3
    assert all(Path(path).exists() for path in named)


@pytest.mark.parametrize("name", NAMES)
def test_an_example_overwrites_nothing(name, base, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(WriteError, match="nothing is overwritten"):
        defined_by(name)["main"](options(base, tmp_path, ROWS[name]))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


LAST = {
    "contrastive_routing": "One page about one of them",
    "continual": "lora forgot",
    "compose_loras": "The same from the command line",
    "to_llama_cpp": "llama-server -m .*Q4_1.gguf",
}


@pytest.mark.slow
@needs_packaged_model
@pytest.mark.parametrize("name", NAMES)
def test_an_example_runs_on_the_packaged_model(name, tmp_path):
    printed = start(name, options("smollm2-135m-instruct", "out", ROWS[name]), tmp_path, timeout=1800)
    assert re.match(LAST[name], printed.strip().splitlines()[-1]), printed
    assert all((tmp_path / "out" / folder / "adapter_model.safetensors").is_file() for folder in ADAPTERS[name])
